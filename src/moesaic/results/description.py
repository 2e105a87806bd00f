"""Result of `describe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Result


@dataclass(frozen=True, kw_only=True)
class DescribedEntry(Result):
    """A stage, a method, a setting of a recipe or an option of a method."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"default", "choices"})

    name: str
    meaning: str
    default: str | None = None
    """As Python writes it; None of what has no value: a stage, a method."""
    choices: list[str] | None = None
    """The words that it may be; None where it is a number, or any text."""


@dataclass(frozen=True, kw_only=True)
class Description(Result):
    """What moesaic has of a kind, and what can be set."""

    what: str
    """`recipes and stages`, or what was asked for."""
    summary: str
    entries: list[DescribedEntry]
