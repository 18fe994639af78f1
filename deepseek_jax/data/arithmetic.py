"""Word problems with worked answers, made from a seed.

Ours, so that a corpus has a domain whose answers are known: `Problem.answer` is what a
reader, or a reward function, should find after "The answer is". Every step of the
working is an equation of whole numbers; * is times and / divides without remainder.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Amir Ana Ben Bo Carla Chen Dana Deng Elif Emil Fatou Finn Gita Hana Hugo Ines "
    "Ivan Jana Joao Kai Kofi Lena Liu Maya Milo Nadia Nils Olga Omar Pia Priya Quinn "
    "Rosa Sami Sven Tara Tom Uma Vera Wei Yara Yusuf Zoe"
)
THINGS = _words(
    "apples beads books bolts bricks buttons candles cards coins eggs flowers lemons "
    "marbles nails nuts oranges pears pencils plates plums postcards seeds shells "
    "stamps stickers stones tickets tiles tools toys"
)
BOXES = _words(
    "bags baskets boxes cartons crates drawers jars rows sacks shelves trays"
)
SHOPS = _words(
    "bakery bookshop florist garage grocer library market museum school shop"
)


class Problem(NamedTuple):
    kind: str
    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        working = " ".join(f"{step}." for step in self.steps)
        return (
            f"Question: {self.question}\n"
            f"Answer: {working} The answer is {self.answer}.\n"
        )


def problems(seed: int) -> Iterator[Problem]:
    """An endless stream of problems, the same for the same seed; some may repeat."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(KINDS)(rng)


def _change(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start, more = rng.randint(5, 900), rng.randint(2, 500)
    lost = rng.randint(1, start + more - 1)
    gone = rng.choice(("gives away", "loses", "sells"))
    question = (
        f"{name} has {start} {thing}, gets {more} more and then {gone} {lost}. "
        f"How many {thing} does {name} have now?"
    )
    held = start + more
    steps = (f"{start} + {more} = {held}", f"{held} - {lost} = {held - lost}")
    return Problem("change", question, steps, held - lost)


def _groups(rng: random.Random) -> Problem:
    thing, box = rng.choice(THINGS), rng.choice(BOXES)
    boxes, each, extra = rng.randint(2, 40), rng.randint(2, 60), rng.randint(1, 99)
    question = (
        f"There are {boxes} {box} with {each} {thing} in each, and {extra} {thing} "
        f"beside them. How many {thing} are there?"
    )
    inside = boxes * each
    steps = (f"{boxes} * {each} = {inside}", f"{inside} + {extra} = {inside + extra}")
    return Problem("groups", question, steps, inside + extra)


def _remainder(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    people, each = rng.randint(2, 25), rng.randint(2, 50)
    left = rng.randint(0, people - 1)
    total = people * each + left
    question = (
        f"{name} shares {total} {thing} equally among {people} children, as many as "
        f"possible to each. How many {thing} are left over?"
    )
    steps = (
        f"{people} * {each} = {total - left}",
        f"{total} - {total - left} = {left}",
    )
    return Problem("remainder", question, steps, left)


def _purchase(rng: random.Random) -> Problem:
    name, shop = rng.choice(NAMES), rng.choice(SHOPS)
    one, two = rng.sample(THINGS, 2)
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    price_a, price_b = rng.randint(2, 60), rng.randint(2, 60)
    cost_a, cost_b = a * price_a, b * price_b
    paid = cost_a + cost_b + rng.randint(0, 99)
    question = (
        f"At the {shop} {name} buys {a} {one} at {price_a} cents each and {b} {two} at "
        f"{price_b} cents each, and pays with {paid} cents. "
        f"What is the change in cents?"
    )
    steps = (
        f"{a} * {price_a} = {cost_a}",
        f"{b} * {price_b} = {cost_b}",
        f"{cost_a} + {cost_b} = {cost_a + cost_b}",
        f"{paid} - {cost_a + cost_b} = {paid - cost_a - cost_b}",
    )
    return Problem("purchase", question, steps, paid - cost_a - cost_b)


def _journey(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    hours, later = rng.randint(1, 9), rng.randint(1, 9)
    speed, slower = rng.randint(11, 120), rng.randint(3, 10)
    first, second = hours * speed, later * slower
    question = (
        f"{name} rides a train for {hours} hours at {speed} km per hour and then walks "
        f"for {later} hours at {slower} km per hour. How many km is that?"
    )
    steps = (
        f"{hours} * {speed} = {first}",
        f"{later} * {slower} = {second}",
        f"{first} + {second} = {first + second}",
    )
    return Problem("journey", question, steps, first + second)


def _discount(rng: random.Random) -> Problem:
    thing = rng.choice(THINGS)
    percent, hundreds = rng.randint(1, 60), rng.randint(1, 40)
    price = 100 * hundreds
    off = percent * hundreds
    question = (
        f"A collection of {thing} costs {price} francs. The price falls by {percent} "
        f"percent. What does it cost now?"
    )
    steps = (
        f"{price} / 100 = {hundreds}",
        f"{hundreds} * {percent} = {off}",
        f"{price} - {off} = {price - off}",
    )
    return Problem("discount", question, steps, price - off)


def _average(rng: random.Random) -> Problem:
    thing = rng.choice(THINGS)
    days = rng.randint(3, 5)
    mean = rng.randint(10, 99)
    counts = [rng.randint(1, mean) for _ in range(days - 1)]
    counts.append(days * mean - sum(counts))
    listed = ", ".join(map(str, counts[:-1])) + f" and {counts[-1]}"
    total = sum(counts)
    question = (
        f"On {days} days {rng.choice(NAMES)} sold {listed} {thing}. "
        f"How many {thing} is that a day on average?"
    )
    steps = (
        f"{' + '.join(map(str, counts))} = {total}",
        f"{total} / {days} = {mean}",
    )
    return Problem("average", question, steps, mean)


def _fence(rng: random.Random) -> Problem:
    long, wide, gate = rng.randint(10, 200), rng.randint(5, 100), rng.randint(1, 9)
    around = 2 * (long + wide)
    question = (
        f"{rng.choice(NAMES)} fences a field {long} m long and {wide} m wide, but "
        f"leaves a gate of {gate} m open. How many m of fence are needed?"
    )
    steps = (
        f"{long} + {wide} = {long + wide}",
        f"2 * {long + wide} = {around}",
        f"{around} - {gate} = {around - gate}",
    )
    return Problem("fence", question, steps, around - gate)


def _ages(rng: random.Random) -> Problem:
    old, young = rng.sample(NAMES, 2)
    age, times, years = rng.randint(2, 20), rng.randint(2, 4), rng.randint(1, 30)
    question = (
        f"{young} is {age} years old, and {old} is {times} times as old. "
        f"How old are the two together in {years} years?"
    )
    older = age * times
    steps = (
        f"{age} * {times} = {older}",
        f"{age} + {older} = {age + older}",
        f"{years} * 2 = {2 * years}",
        f"{age + older} + {2 * years} = {age + older + 2 * years}",
    )
    return Problem("ages", question, steps, age + older + 2 * years)


def _fraction(rng: random.Random) -> Problem:
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
    parts = rng.randint(3, 12)
    taken, part = rng.randint(2, parts - 1), rng.randint(2, 80)
    total = parts * part
    question = (
        f"{name} paints {taken}/{parts} of the {total} {thing}. "
        f"How many {thing} stay unpainted?"
    )
    painted = taken * part
    steps = (
        f"{total} / {parts} = {part}",
        f"{part} * {taken} = {painted}",
        f"{total} - {painted} = {total - painted}",
    )
    return Problem("fraction", question, steps, total - painted)


def _product(rng: random.Random) -> Problem:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    question = f"What is {a} times {b}?"
    steps = (
        f"{a} * {b} = {a} * {tens} + {a} * {ones}",
        f"{a} * {tens} = {a * tens}",
        f"{a} * {ones} = {a * ones}",
        f"{a * tens} + {a * ones} = {a * b}",
    )
    return Problem("product", question, steps, a * b)


def _clock(rng: random.Random) -> Problem:
    hour, minute, extra = rng.randint(1, 9), rng.randint(0, 59), rng.randint(20, 240)
    question = (
        f"{rng.choice(NAMES)} works for {hour} hours and {minute} minutes at the "
        f"{rng.choice(SHOPS)} and for {extra} minutes at home. "
        f"How many minutes is that?"
    )
    there = 60 * hour + minute
    steps = (
        f"60 * {hour} = {60 * hour}",
        f"{60 * hour} + {minute} = {there}",
        f"{there} + {extra} = {there + extra}",
    )
    return Problem("clock", question, steps, there + extra)


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _change,
    _groups,
    _remainder,
    _purchase,
    _journey,
    _discount,
    _average,
    _fence,
    _ages,
    _fraction,
    _product,
    _clock,
)
