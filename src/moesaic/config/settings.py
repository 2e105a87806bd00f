"""Settings from Python, options or recipes, checked the same way whichever they come from."""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from .. import given, registry
from ..errors import InputError
from ..given import shown
from ..results import Json

LARGEST, DEEPEST = 1_000_000, 20
"""Bytes and levels of a recipe, at most."""


def _checked(stage: str, method: object) -> object:
    if method is None or isinstance(method, str):
        return method
    if not is_dataclass(method) or isinstance(method, type):
        raise InputError(f"--{stage} is {shown(method)}; give a name, one of {', '.join(registry.names(stage))}")
    return registry.build(stage, method)


def _written(stage: str, method: object) -> str | None:
    return None if method is None else registry.text(stage, method)


def _field(stage: str) -> tuple[BeforeValidator, PlainSerializer]:
    """Say how a field that holds a method is read and written: its text, or the object, written as its text."""
    return BeforeValidator(partial(_checked, stage)), PlainSerializer(partial(_written, stage))


PartitionField = Annotated[object, *_field("partition")]
RouterField = Annotated[object, *_field("router")]
SelectionField = Annotated[object, *_field("selection")]
RecoveryField = Annotated[object, *_field("recovery")]
FormatField = Annotated[object, *_field("format")]
MethodField = Annotated[object, *_field("method")]
LearnerField = Annotated[object, *_field("learner")]
PrunerField = Annotated[object, *_field("pruning")]


def read_recipe(file: Path) -> Any:
    """Read a small UTF-8 file of YAML, with or without a byte order mark.

    Raises:
        InputError: no such file, one that is too large or no YAML in UTF-8, aliases, with which a few lines can be made
            to fill the memory, or parts that are nested deeper than any recipe needs.
    """
    if not file.is_file():
        what = "it is a folder; give a file in it" if file.is_dir() else "there is no such file"
        raise InputError(f"no recipe '{file}': {what}")
    if file.stat().st_size > LARGEST:
        raise InputError(f"'{file}' is no recipe: it has more than {LARGEST:,} bytes")
    depth = 0
    try:
        text = file.read_text(encoding="utf-8-sig")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"'{file}' has an alias, *{event.anchor}; write out what it stands for")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise InputError(f"'{file}' is nested deeper than {DEEPEST} levels; write one 'setting: value' a line")
        return yaml.safe_load(text)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"'{file}' is not YAML in UTF-8: {' '.join(str(error).split())}") from error


class Settings(BaseModel):
    """Settings that come from Python, from options, or from a YAML recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    section: ClassVar[str]
    """Where they stand in a saved `moesaic.yaml`."""

    def __init__(self, **settings: object) -> None:
        """Take settings from Python, checked as those of the command line are.

        Raises:
            InputError: an unknown setting (with the nearest name), or a value that does not fit.
        """
        for name in settings:
            if name not in type(self).model_fields:
                hint = registry.nearest(str(name), type(self).model_fields)
                raise InputError(f"there is no setting {shown(name)}.{hint}")
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
                raise cause from error
            name = "--" + str(first["loc"][0]).replace("_", "-")
            raise InputError(f"{name} is {shown(first['input'])}: {first['msg'].lower()}") from error

    @field_validator("*", mode="before")
    @classmethod
    def _within_limits(cls, value: object, info: ValidationInfo) -> object:
        name = info.field_name or ""
        return given.number(name, value) if name in given.LIMITS and value is not None else value

    @field_validator("teacher", "calibration", "data", check_fields=False)
    @classmethod
    def _without_tilde(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple):
            return tuple(given.place(source) for source in value)
        return None if value is None else given.place(value)

    @classmethod
    def read(cls, recipe: Path | None, settings: Json) -> Self:
        """Take settings from a YAML recipe (or a saved `moesaic.yaml`), overridden by those that are given.

        Raises:
            InputError: no such file, an unknown setting (with the nearest name) or a value that does not fit.
        """
        return cls(**cls.combine({} if recipe is None else cls._recipe(given.path(recipe)), settings))

    @classmethod
    def combine(cls, recipe: Json, settings: Json) -> Json:
        """Override the settings of a recipe by those that are given."""
        return recipe | settings

    @classmethod
    def _recipe(cls, recipe: Path) -> Json:
        content = read_recipe(recipe)
        content = content.get(cls.section, content) if isinstance(content, dict) else content
        if not isinstance(content, dict | None):
            raise InputError(f"'{recipe}' is no recipe: it holds {shown(content)}; write one 'setting: value' a line")
        content = dict(content or {})
        for name in content:
            if name not in cls.model_fields:
                hint = registry.nearest(str(name), cls.model_fields)
                raise InputError(f"'{recipe}' has an unknown setting {shown(name)}.{hint}")
        return content

    def to_yaml(self) -> str:
        """Write all settings as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
