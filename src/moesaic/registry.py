"""Methods by name: a method is one file in its stage's package, and its name is the file's name.

`partition/cmoe.py` holds one dataclass that derives from `partition.base.Partitioner`; that makes `--partition cmoe`
work, lists it in the help and puts it under the tests. Underscores in file names are dashes in the help; on the command
line either will do.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .errors import InputError

STAGES = {
    "partition": "moesaic.partition",
    "router": "moesaic.routing",
    "recovery": "moesaic.recovery",
    "export": "moesaic.formats.architectures",
    "method": "moesaic.training.methods",
}
WITH_AUTO = {"partition", "export"}
"""Stages where `auto`, resolved elsewhere, is a choice too."""


def names(stage: str) -> list[str]:
    """The names of a stage's methods, sorted: every module of its package but `base` and private ones."""
    package = importlib.import_module(STAGES[stage])
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.replace("_", "-") for name in modules if name != "base" and not name.startswith("_"))


def nearest(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the most similar choice, or nothing."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def method(stage: str, name: str) -> type[Any]:
    """The class behind a method's name.

    Raises:
        InputError: no such method; the message has the nearest name and all choices.
    """
    choices, name = names(stage), name.replace("_", "-")
    if name not in choices:
        known = ["auto", *choices] if stage in WITH_AUTO else choices
        raise InputError(f"unknown {stage} '{name}'.{nearest(name, known)} Choose from: {', '.join(known)}.")
    package = importlib.import_module(STAGES[stage])
    module = importlib.import_module(f"{STAGES[stage]}.{name.replace('-', '_')}")
    found = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, package.Base)]
    [cls] = [c for c in found if c.__module__ == module.__name__]
    return cls


def build(stage: str, spec: str) -> Any:
    """A method from `name` or `name:field=value,field=value`, e.g. `cmoe:top_k=20`.

    Raises:
        InputError: unknown method or field, or a value that is not a Python literal.
    """
    name, _, arguments = spec.partition(":")
    cls = method(stage, name)
    known = {field.name for field in fields(cls) if field.init}
    options = {}
    for argument in filter(None, arguments.split(",")):
        key, _, text = argument.partition("=")
        if key not in known:
            hint = nearest(key, known) or f" It has: {', '.join(sorted(known)) or 'no options'}."
            raise InputError(f"{stage} '{name}' has no option '{key}'.{hint}")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise InputError(f"option {key} of {stage} '{name}' is '{text}', expected a number or True/False") from None
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"option {first['loc'][-1]} of {stage} '{name}' is {first['input']!r}: {first['msg']}"
        ) from error


def spec(instance: Any) -> str:
    """The text from which `build` makes an equal instance, e.g. `cmoe:top_k=20`; defaults are left out."""
    name = type(instance).__module__.rpartition(".")[2].replace("_", "-")
    values = {field.name: getattr(instance, field.name) for field in fields(instance)}
    changed = ",".join(f"{k}={v!r}" for k, v in values.items() if v != getattr(type(instance)(), k))
    return f"{name}:{changed}" if changed else name
