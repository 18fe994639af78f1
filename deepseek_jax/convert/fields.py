"""Fields of a config.json: each is checked where it is read, and named when wrong.

For DeepSeek's released files (arXiv:2412.19437). A field that is null counts as absent.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

Fields = Mapping[str, Any]


def refuse(name: str, value: object, right: str) -> NoReturn:
    """Raises ValueError: a field asks for what this library does not compute."""
    raise ValueError(f"config.json: {name} = {value!r} is not supported: {right}")


def integer(fields: Fields, name: str, default: int | None = None, at: str = "") -> int:
    """A whole number >= 0; without a default it must be there. `at` is its block.

    Raises:
      ValueError: it is something else; names it.
    """
    value = fields.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 0:
        raise ValueError(
            f"config.json: {at}{name} = {value!r}: must be an integer >= 0"
        )
    return value


def number(
    fields: Fields, name: str, default: float | None = None, at: str = ""
) -> float:
    """A finite number >= 0; without a default it must be there. `at` is its block.

    Raises:
      ValueError: it is something else; names it.
    """
    value: Any = fields.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"config.json: {at}{name} = {value!r}: must be a number >= 0")
    return float(value)


def only(fields: Fields, known: Collection[str], at: str = "") -> None:
    """Refuses every field but the known ones; one that is null asks for nothing.

    Raises:
      ValueError: names the field and the known one that is most like it.
    """
    for name, value in fields.items():
        if name not in known and value is not None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            refuse(f"{at}{name}", value, f"this library knows no such field{hint}")


@contextmanager
def named(theirs: Mapping[str, str]) -> Iterator[None]:
    """Errors of our config classes in the words of the file, by our field names.

    Raises:
      ValueError: the translated one.
    """
    try:
        yield
    except ValueError as error:
        text = re.sub(r"[\w.]+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ValueError(f"config.json: {text}") from None
