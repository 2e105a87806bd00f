"""Read values of rows that came from JSON, with their types checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def number(row: Mapping[str, object], name: str) -> float:
    """Read the number of that name.

    Raises:
        TypeError: it is none.
    """
    value = row[name]
    if not isinstance(value, int | float):
        raise TypeError(f"'{name}' is {value!r}; expected a number")
    return float(value)


def part(row: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Read the row inside a row; an empty one where it is missing or null.

    Raises:
        TypeError: it is no row.
    """
    value = row.get(name) or {}
    if not isinstance(value, Mapping):
        raise TypeError(f"'{name}' is {value!r}; expected an object")
    return {str(key): inner for key, inner in value.items()}


def parts(row: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    """Read the list of rows inside a row.

    Raises:
        TypeError: it is no list of rows.
    """
    value = row.get(name) or []
    if not isinstance(value, Sequence) or not all(isinstance(inner, Mapping) for inner in value):
        raise TypeError(f"'{name}' is no list of objects")
    return [{str(key): item for key, item in inner.items()} for inner in value]


def numbers(row: Mapping[str, object], name: str) -> list[float]:
    """Read the list of numbers of that name; empty where it is missing or null.

    Raises:
        TypeError: it is no list of numbers.
    """
    value = row.get(name) or []
    if not isinstance(value, Sequence) or not all(isinstance(inner, int | float) for inner in value):
        raise TypeError(f"'{name}' is no list of numbers")
    return [float(inner) for inner in value]
