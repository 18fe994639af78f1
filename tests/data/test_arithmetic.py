"""Word problems: the answers are worked out again, from the question alone."""

import itertools
import math
import operator
import re
from collections import Counter

import pytest

from deepseek_jax.data.arithmetic import KINDS, problems

SAMPLE = list(itertools.islice(problems(seed=7), 3000))

# Per kind, the answer from the numbers of the question in their order.
SOLVE = {
    "change": lambda start, more, lost: start + more - lost,
    "groups": lambda boxes, each, extra: boxes * each + extra,
    "remainder": operator.mod,
    "purchase": lambda a, p, b, q, paid: paid - a * p - b * q,
    "journey": lambda hours, speed, later, slower: hours * speed + later * slower,
    "discount": lambda price, percent: price * (100 - percent) // 100,
    "average": lambda days, *counts: sum(counts) // days,
    "fence": lambda long, wide, gate: 2 * long + 2 * wide - gate,
    "ages": lambda age, times, years: age * (1 + times) + 2 * years,
    "fraction": lambda taken, parts, total: total - total * taken // parts,
    "product": math.prod,
    "clock": lambda hours, minutes, extra: 60 * hours + minutes + extra,
}


def solve(problem):
    numbers = list(map(int, re.findall(r"\d+", problem.question)))
    if problem.kind == "product":
        return SOLVE["product"](numbers)
    return SOLVE[problem.kind](*numbers)


def value(expression):
    """A sum, difference, product or exact quotient of whole numbers."""
    assert re.fullmatch(r"\d+( [-+*/] \d+)*", expression), expression
    result = eval(expression)
    assert result == int(result)
    return int(result)


def test_every_kind_occurs_about_equally_often():
    counts = Counter(problem.kind for problem in SAMPLE)
    assert counts.keys() == SOLVE.keys()
    assert len(counts) == len(KINDS)
    assert min(counts.values()) > 150


@pytest.mark.parametrize("kind", SOLVE)
def test_answers_are_right(kind):
    for problem in SAMPLE:
        if problem.kind == kind:
            assert problem.answer == solve(problem), problem.text


def test_every_step_is_true_and_the_last_gives_the_answer():
    for problem in SAMPLE:
        for step in problem.steps:
            left, right = step.split(" = ")
            assert value(left) == value(right), problem.text
        assert problem.steps[-1].endswith(f" = {problem.answer}")
        assert problem.text.endswith(f"The answer is {problem.answer}.\n")


def test_the_seed_decides():
    again = list(itertools.islice(problems(seed=7), 50))
    other = list(itertools.islice(problems(seed=8), 50))
    assert again == SAMPLE[:50]
    assert other != again
