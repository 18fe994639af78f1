"""Nested dataclasses from plain dicts and back, with errors that name the field.

Ours; `config` and the commands on top of it use it for every setting of a run.
"""

import dataclasses
import difflib
import json
import types
import typing


def check(ok: bool, name: str, value: object, right: str) -> None:
    """Refuses the value of a field.

    Raises:
      ValueError: names the field, the value and what would be right.
    """
    if not ok:
        raise ValueError(f"{name} = {value!r}: {right}")


def positive(prefix: str, config: object, *names: str) -> None:
    """Refuses fields that are not above 0, as `check`."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{prefix}.{name}", value, "must be positive")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not among those allowed, as `check`."""
    near = difflib.get_close_matches(str(value), allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    check(value in allowed, name, value, f"must be one of {', '.join(allowed)}{hint}")


def to_dict(config: typing.Any) -> dict[str, typing.Any]:
    """The nested plain dict of a config, fit for JSON; `from_dict` inverts it."""
    return dataclasses.asdict(config)


def flatten(values: typing.Any, at: str = "") -> dict[str, typing.Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, with tuples as lists, as JSON has them."""
    flat: dict[str, typing.Any] = {}
    for key, value in values.items():
        if isinstance(value, typing.Mapping):
            flat |= flatten(value, f"{at}{key}.")
        else:
            flat[f"{at}{key}"] = json.loads(json.dumps(value))
    return flat


def from_dict[T](
    cls: type[T], values: typing.Mapping[str, typing.Any], at: str = ""
) -> T:
    """Builds a config dataclass from a nested mapping; keys left out keep their
    default.

    Raises:
      ValueError: an unknown key (the nearest known one is named), a value of another
        type, or whatever the dataclass itself refuses.
    """
    hints = typing.get_type_hints(cls)
    parsed = {}
    for key, value in values.items():
        name = f"{at}.{key}" if at else key
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown config key {name!r}{hint}")
        parsed[key] = _parse(hints[key], value, name)
    return cls(**parsed)


def _parse(hint: typing.Any, value: typing.Any, name: str) -> typing.Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        check(hasattr(value, "items"), name, value, "must be a group of settings")
        return from_dict(hint, value, name)
    if isinstance(hint, types.GenericAlias):
        (left, right), pairs = typing.get_args(typing.get_args(hint)[0]), "step, value"
        if left is str:
            pairs = "pattern, axes"
        try:
            return tuple((left(first), right(second)) for first, second in value)
        except (TypeError, ValueError):
            check(False, name, value, f"must be ({pairs}) pairs")
    if hint is float and type(value) is int:
        return float(value)
    check(type(value) is hint, name, value, f"must be {hint.__name__}")
    return value
