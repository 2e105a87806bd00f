"""What recipes may hold, which methods a stage has, and what each method's options are."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from textwrap import dedent
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from .. import given, registry
from ..errors import InputError
from ..results import DescribedEntry, Description
from .adaptation import AdaptConfig
from .conversion import ConvertConfig
from .pruning import PruneConfig
from .settings import Settings
from .training import FinetuneConfig

RECIPES: dict[str, type[Settings]] = {
    "convert": ConvertConfig,
    "finetune": FinetuneConfig,
    "adapt": AdaptConfig,
    "prune": PruneConfig,
}
"""The verbs whose settings a recipe may hold."""


def describe(what: str | None = None) -> Description:
    """Describe a recipe's settings, a stage's methods or a method's options: names, defaults and meanings.

    Args:
        what: a verb with recipes (`finetune`), a stage (`partition`), a method (`partition:cmoe`, or
            `partition:my_file:MyPartitioner` of your own); None lists what there is to describe.

    Raises:
        InputError: there is no such recipe, stage or method.
    """
    if what is None:
        recipes = [DescribedEntry(name=verb, meaning=f"settings of {verb} --recipe FILE") for verb in RECIPES]
        stages = [_stage(name) for name in registry.STAGES]
        return Description(what="recipes and stages", summary="Ask for one of these by its name.",
                           entries=recipes + stages)  # fmt: skip
    asked = given.text(what, "WHAT")
    stage, _, method = asked.partition(":")
    if asked in RECIPES:
        cls = RECIPES[asked]
        summary = f"'setting: value', a line each, in a file for moesaic {asked} --recipe FILE."
        return Description(what=asked, summary=summary, entries=list(_settings(cls)))
    if stage not in registry.STAGES:
        known = [*RECIPES, *registry.STAGES]
        raise InputError(
            f"nothing is called '{asked}'.{registry.nearest(stage, known)} Choose from: {', '.join(known)}; or a "
            "method, such as partition:cmoe"
        )
    if not method:
        methods = [DescribedEntry(name=name, meaning=_summary(stage, name)) for name in registry.names(stage)]
        return Description(what=asked, summary=registry.STAGES[stage].options, entries=methods)
    if method == "auto" and stage in registry.WITH_AUTO:
        raise InputError(f"'{asked}' chooses among the methods of '{stage}', and has no options; describe {stage}")
    name, options = registry.split(stage, method)
    if options:
        raise InputError(f"'{asked}' sets options; give the method alone: {stage}:{name}")
    return Description(
        what=asked, summary=_summary(stage, name), entries=list(_options(registry.method_class(stage, name)))
    )


def _stage(name: str) -> DescribedEntry:
    return DescribedEntry(name=name, meaning=f"{registry.STAGES[name].options}: {', '.join(registry.names(name))}")


def _summary(stage: str, name: str) -> str:
    """Read the first line of a built-in method's file, which names its source; of others, that of the class."""
    cls = registry.method_class(stage, name)
    built_in = cls.__module__.startswith(f"{registry.STAGES[stage].package}.")
    text = sys.modules[cls.__module__].__doc__ if built_in else cls.__doc__
    only_simulated = "" if getattr(cls, "online", True) else " For simulations alone."
    return inspect.cleandoc(text or "").partition("\n")[0] + only_simulated


def _settings(cls: type[Settings]) -> Iterator[DescribedEntry]:
    docs = attribute_docs(cls)
    for name, field in cls.model_fields.items():
        yield DescribedEntry(
            name=name, meaning=docs.get(name, ""), default=repr(field.default), choices=_choices(field.annotation)
        )


def _options(cls: type) -> Iterator[DescribedEntry]:
    docs, hints = attribute_docs(cls), get_type_hints(cls)
    for field in fields(cls):  # pyrefly: ignore[bad-argument-type]
        if field.init:
            yield DescribedEntry(
                name=field.name, meaning=docs.get(field.name, ""), default=repr(registry.default(field)),
                choices=_choices(hints[field.name]),
            )  # fmt: skip


def _choices(hint: object) -> list[str] | None:
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    if get_origin(hint) in (Union, UnionType, Annotated):
        return next((found for part in get_args(hint) if (found := _choices(part))), None)
    return None


def attribute_docs(cls: type) -> dict[str, str]:
    """Read the texts that stand below a class's attributes, and below those of the classes that it derives from."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            [tree] = ast.parse(dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # built in, or typed into a shell
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for before, after in pairwise(body):
            match before, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs
