"""Find methods by name: a method is one file in its stage's package, an entry point, or `module:Class` of your own.

`partition/cmoe.py` holds one dataclass that derives from `partition.base.Partitioner`; that makes `--partition cmoe`
work, lists it in the help and puts it under the tests. Another package offers methods by entry points of the group
`moesaic.partition` (`moesaic.router`, ...). A class in a notebook is given to Python as an object, one in a file to
the command line as `--partition my_file:MyPartitioner`. Underscores in file names are dashes in the help; on the
command line either will do. Options follow a colon: `cmoe:top_k=20`, `my_file:MyPartitioner:width=3`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from .errors import InputError, first_line
from .given import LIMITS, OPTION, shown


class Stage(NamedTuple):
    """Where a stage's methods are."""

    package: str
    """One method a file."""
    base: str
    """`module:Class` that all of them derive from."""
    options: str
    """Of the command line, that take a method's name."""


STAGES = {
    "partition": Stage("moesaic.partition", "moesaic.partition.base:Partitioner", "convert --partition"),
    "router": Stage("moesaic.routing", "moesaic.routing.base:Router", "convert --router"),
    "selection": Stage(
        "moesaic.routing.selection", "moesaic.routing.selection.base:Selection", "adapt --method, convert --selection"
    ),
    "recovery": Stage("moesaic.recovery", "moesaic.recovery.base:Recovery", "convert --recovery"),
    "method": Stage("moesaic.training.methods", "moesaic.training.methods.base:Method", "finetune --method"),
    "learner": Stage("moesaic.adaptation.learners", "moesaic.adaptation.learners.base:Learner", "adapt --learner"),
    "pruning": Stage("moesaic.pruning.methods", "moesaic.pruning.methods.base:PruningMethod", "prune --method"),
    "cache": Stage("moesaic.store.policies", "moesaic.store.policies.base:Policy", "generate --cache"),
    "format": Stage("moesaic.formats.architectures", "moesaic.formats.base:Format", "convert --format"),
}
"""By the name of the option that chooses a method."""
WITH_AUTO = {"partition", "format"}
"""Stages where `auto`, resolved elsewhere, is a choice too."""
OUTSIDE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(:.*)?")
"""`module:Class`, perhaps with options."""


def names(stage: str) -> list[str]:
    """List the names of a stage's methods, sorted: the files of its package and installed entry points."""
    return sorted({*_built_in(stage), *_entry_points(stage)})


@cache
def _built_in(stage: str) -> tuple[str, ...]:
    folder = Path(__file__).parent.joinpath(*STAGES[stage].package.split(".")[1:])  # nothing is imported for a list
    modules = pkgutil.iter_modules([str(folder)])
    listed = (m.name for m in modules if m.name != "base" and not m.name.startswith("_") and not m.ispkg)
    return tuple(name.replace("_", "-") for name in listed)


def _entry_points(stage: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name.replace("_", "-"): point for point in importlib.metadata.entry_points(group=f"moesaic.{stage}")}


def nearest(name: str, choices: Iterable[str]) -> str:
    """Suggest the most similar choice, ` Did you mean 'x'?`; an empty text where none is similar."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def method_class(stage: str, name: str, *, imported_only: bool = False) -> type:
    """Find the class behind a method's name or its `module:Class`.

    Args:
        stage: of `STAGES`.
        name: of a file of the stage's package, of an entry point, or `module:Class`.
        imported_only: whether a module of `module:Class` must have been imported before: a name that stands in a
            checkpoint must not make Python run a file.

    Raises:
        InputError: no such method (the message has the nearest name and all choices), or no subclass of the stage's
            base class.
    """
    if ":" in name:
        return _outside_class(stage, name, imported_only)
    name = name.replace("_", "-")
    if name in _built_in(stage):
        module = importlib.import_module(f"{STAGES[stage].package}.{name.replace('-', '_')}")
        own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        [cls] = [c for c in own if issubclass(c, base_class(stage))]
        return cls
    points = _entry_points(stage)
    if name in points:
        return _checked(stage, name, points[name].load())
    known = ["auto", *names(stage)] if stage in WITH_AUTO else names(stage)
    raise InputError(
        f"unknown {stage} '{name}'.{nearest(name, known)} Choose from: {', '.join(known)}; or "
        "give module:Class of your own."
    )


def base_class(stage: str) -> type:
    """Find the class that all methods of a stage derive from."""
    module, _, name = STAGES[stage].base.partition(":")
    return getattr(importlib.import_module(module), name)


def _outside_class(stage: str, name: str, imported_only: bool) -> type:
    module_name, _, class_name = name.partition(":")
    if imported_only and module_name not in sys.modules:
        raise InputError(
            f"this model's {stage} is '{name}', which is not part of moesaic; if you trust it, import {module_name} "
            f"first (moesaic --import {module_name} ...)"
        )
    module = import_module(module_name)
    found = getattr(module, class_name, None)
    if found is None:
        raise InputError(f"{stage} '{name}': '{module_name}' has no '{class_name}'{nearest(class_name, dir(module))}")
    return _checked(stage, name, found)


def import_module(name: str) -> ModuleType:
    """Import a module of the user's, from the working folder too, as `python -m` does.

    Raises:
        InputError: there is none, or it fails.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError("it is no module's name")
        return sys.modules.get(name) or importlib.import_module(name)
    except Exception as error:  # a module is a program, and may raise anything
        raise InputError(
            f"cannot import '{name}' ({first_line(error)}); give a module's name as Python imports it, from this "
            "folder or from an installed package"
        ) from error


def _checked(stage: str, name: str, found: object) -> type:
    base = base_class(stage)
    if not (inspect.isclass(found) and issubclass(found, base) and is_dataclass(found)):
        raise InputError(f"{stage} '{name}' is {found!r}; expected a dataclass that derives from {base.__name__}")
    return found


def build(stage: str, given: object, *, imported_only: bool = False) -> Any:
    """Make a method from `name` or `name:field=value,field=value`, e.g. `cmoe:top_k=20`; an object stays as it is.

    Raises:
        InputError: unknown method or field, a value that is not a Python literal, or an object of another stage.
    """
    if given is None:
        raise InputError(f"no {stage} is named; choose from: {', '.join(names(stage))}")
    if not isinstance(given, str):
        _checked(stage, type(given).__name__, type(given))
        return _within_limits(stage, given)
    name, arguments = split(stage, given)
    cls = method_class(stage, name, imported_only=imported_only)
    known = {field.name for field in fields(cls) if field.init}  # pyrefly: ignore[bad-argument-type]
    options, words = {}, set[str]()
    for key, text in _options(arguments):
        if key not in known:
            hint = nearest(key, known) or f" It has: {', '.join(sorted(known)) or 'no options'}."
            raise InputError(f"{stage} '{name}' has no option '{key}'.{hint}")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            options[key] = text  # where it is to be one of some words
            words.add(key)
    try:
        return _within_limits(stage, _validator(cls).validate_python(options))
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"][-1] in words and first["type"] != "literal_error":
            raise InputError(
                f"option {first['loc'][-1]} of {stage} '{name}' is {shown(first['input'])}, expected a number or "
                "True/False"
            ) from None
        raise InputError(
            f"option {first['loc'][-1]} of {stage} '{name}' is {shown(first['input'])}: {first['msg']}"
        ) from error


@cache
def _validator(cls: type) -> TypeAdapter[object]:
    """Make what checks a class's options, once: a model has a gate in each layer."""
    return TypeAdapter(cls)


def _within_limits(stage: str, method: Any) -> Any:
    """Return a method whose numbers are all within its own `limits`, those of `LIMITS`, or at least within `OPTION`.

    Raises:
        InputError: one is not.
    """
    for field in fields(method):
        own = getattr(method, "limits", {}).get(field.name)
        value, limit = getattr(method, field.name), own or LIMITS.get(field.name, OPTION)
        if isinstance(value, int | float) and not isinstance(value, bool) and not limit.holds(value):
            name = spec_name(type(method))
            raise InputError(f"option {field.name} of {stage} '{name}' is {shown(value)}; give {limit}")
    return method


def _options(arguments: str) -> list[tuple[str, str]]:
    """Split `a=1,b=(2, 3)` into names and values; a comma within a value belongs to it."""
    parts: list[str] = []
    for part in filter(None, arguments.split(",")):
        if parts and not re.match(r"\s*[A-Za-z_]\w*\s*(=|$)", part):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    pairs = (part.partition("=") for part in parts)
    return [(key.strip(), value) for key, _, value in pairs]


def split(stage: str, text: str) -> tuple[str, str]:
    """Split a method's text into name and options: `cmoe:top_k=20` or `module:Class:width=3`."""
    name, _, arguments = text.partition(":")
    if OUTSIDE.fullmatch(text) and name.replace("_", "-") not in names(stage):
        class_name, _, arguments = arguments.partition(":")
        name = f"{name}:{class_name}"
    return name, arguments


def default(field: Field) -> object:
    """Read an option's default."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def text(stage: str, given: object) -> str:
    """Write what a configuration holds, a text or a method, as text.

    Raises:
        InputError: it is neither.
    """
    return given if isinstance(given, str) else spec(build(stage, given))


def spec(method: object) -> str:
    """Write a method as the text from which `build` makes an equal one; options at their defaults are left out."""
    cls = type(method)
    name = spec_name(cls)
    options = [f for f in fields(cls) if f.init]  # pyrefly: ignore[bad-argument-type]
    changed = ",".join(f"{f.name}={v!r}" for f in options if (v := getattr(method, f.name)) != default(f))
    return f"{name}:{changed}" if changed else name


def spec_name(cls: type) -> str:
    """Name a method's class: its file in our packages, else `module:Class`."""
    package, _, module = cls.__module__.rpartition(".")
    ours = package in {stage.package for stage in STAGES.values()}
    return module.replace("_", "-") if ours else f"{cls.__module__}:{cls.__qualname__}"
