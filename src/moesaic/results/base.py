"""From results to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError

from ..errors import InputError

Json = dict[str, Any]
"""What `json.loads` gives for a JSON object."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A frozen record; its fields are the keys of its JSON."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset()
    """Fields that JSON leaves out where they are None."""

    def to_dict(self) -> Json:
        """Write the record as plain dictionaries, lists and numbers, ready for `json.dumps`."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {k: v for k, v in values.items() if v is not None or k not in self.omitted_when_none}

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: str = "") -> Self:
        """Read a record back; keys that are no fields are passed over.

        Args:
            values: what `to_dict` gave, or `json.loads`.
            where: the file that it is from, for the message.

        Raises:
            InputError: a key is missing or its value is of another type.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "all of it"
            raise InputError(
                f"{where or 'the record'} is damaged: {place}: {first['msg'].lower()}; make it anew, or copy it from "
                "where it was made"
            ) from error


def _plain(value: object) -> object:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
