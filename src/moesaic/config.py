"""What a conversion and a training are asked to do, resolved from options and recipes and saved beside their output."""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

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

from . import given, registry
from .errors import InputError
from .given import shown
from .results import Json

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
PrunerField = Annotated[object, *_field("pruning")]


def read_yaml(file: Path) -> Any:
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
        content = read_yaml(recipe)
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


class ConvertConfig(Settings):
    """Everything that decides a conversion's result; saved as `moesaic.yaml` with the output."""

    section: ClassVar[str] = "config"

    active: float | None = None
    """The ffn share: the part of each FFN's neurons that one token runs; the shape follows from it."""
    memory_factor: float = 1.0
    """Size of all experts relative to the dense FFN; `specialists` alone use more than 1, and `auto` may decline it."""
    plan: str | None = None
    """A fixed disjoint shape such as `S3A3E8`, instead of `active`."""
    expert_width: int | None = None
    """Neurons in a group."""
    fine: bool = False
    """About 64 groups in place of 16; with partition `auto`, try that too."""
    partition: PartitionField = "auto"
    """Partitioning method; `auto` tries `specialists` and `coactivation` on part of the model and takes the better."""
    router: RouterField = None
    """Routing method; None takes the one that belongs to the partition."""
    selection: SelectionField = None
    """Which and how many experts run by their scores; None takes the one that belongs to the router, mostly `top-k`."""
    recovery: RecoveryField = "closed-form"
    calibration: tuple[str, ...] = ()
    """Text files, .jsonl files or `datasets` names; none means the bundled text."""
    tokens: int = 16_384
    """Calibration tokens."""
    window: int = 256
    """Tokens in one calibration sequence."""
    first_tokens: int | None = None
    """Tokens, each a text's first, that recovery fits beside the others; None: an eighth of `tokens`, 0 after a BOS."""
    held_out_tokens: int = 4_096
    """Tokens of bundled held-out text for the perplexity that is compared with the dense model's."""
    format: FormatField = "auto"
    """`moesaic` (which holds everything), `glm4_moe` and other stock architectures, or `auto`: the first that fits."""
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    collapse_ratio: float = 100.0
    """Perplexity above this many times the dense model's is a collapse."""

    @classmethod
    def combine(cls, recipe: Json, settings: Json) -> Json:
        """Override the settings of a recipe; a given share takes the place of a plan, and a given plan of a share."""
        for name, other in (("plan", "active"), ("active", "plan")):
            if name in settings:
                recipe.pop(other, None)
        return recipe | settings


class FinetuneConfig(Settings):
    """Everything that decides a training's result but the model, the teacher and the time that `minutes` give."""

    section: ClassVar[str] = "finetune"

    method: MethodField = "lora"
    """What learns: `lora`, `full`, `router`, or a published method; with options, `lora:rank=16`."""
    objective: Literal["lm", "distill", "both"] = "both"
    """Next-token loss, the distance from the teacher's distribution, or the mean of both."""
    teacher: str | None = None
    """The dense model; None is the one that the model was converted from."""
    data: tuple[str, ...] = ()
    """Text files, .jsonl files (`text`, or `prompt` and `response`) or `datasets` names; none: the bundled text."""
    samples: int = 2_000
    """Sequences that training may use; fewer if the data has fewer."""
    window: int = 512
    """Tokens in a sequence."""
    steps: int | None = None
    """Steps in all; None is what `minutes` allow, or else one pass over the samples."""
    minutes: float | None = None
    """Minutes in all; a step that has begun is finished."""
    batch: int = 2
    """Sequences in a step, over all processes."""
    learning_rate: float | None = None
    """Of all but the routers; None is the method's own."""
    router_learning_rate: float | None = None
    """Of the routers; None is the method's own."""
    warmup: float = 0.05
    """Share of the training in which the learning rate rises; then it falls as a cosine to a tenth."""
    top_k: int = 64
    """Of the teacher's logits, the largest that are kept; the rest of the probability is one more class."""
    match: float = 0.0
    """Weight of the relative squared distance of each layer's output from the teacher's."""
    balance: Literal["none", "bias", "loss"] = "none"
    """Evening out the experts' load: by the selection bias (CMoE, DeepSeek-V3), by a loss (Switch), or not."""
    balance_step: float = 1e-3
    """Of `bias`: how far it moves in a step (CMoE's γ)."""
    balance_weight: float = 0.01
    """Of `loss`: its weight in nats a token (Switch's α)."""
    held_out: int = 12
    """Sequences of the data that are not trained on and decide which state is kept."""
    evaluations: int = 6
    """How often the held-out loss is measured on the way."""
    patience: int = 3
    """Evaluations in a row without a new least held-out loss after which training stops."""
    shard: bool = False
    """Whether processes hold a part of each parameter (FSDP) instead of all of them (DDP)."""
    device: str = "auto"
    seed: int = 0

    @classmethod
    def combine(cls, recipe: Json, settings: Json) -> Json:
        """Override the settings of a recipe; `rank` and `alpha` are short for options of the method."""
        content = recipe | settings
        given.check(rank=content.get("rank"), alpha=content.get("alpha"))
        adapters = [f"{name}={content.pop(name)}" for name in ("rank", "alpha") if name in content]
        if adapters:
            method = registry.text("method", content.get("method", cls().method))
            options = [registry.split("method", method)[1], *adapters]
            name = method.removesuffix(f":{options[0]}")
            content["method"] = f"{name}:{','.join(filter(None, options))}"
            registry.build("method", content["method"])
        return content


class PruneConfig(Settings):
    """Everything that decides what a pruned model is; saved in `moesaic.yaml` with the output."""

    section: ClassVar[str] = "pruning"

    experts: int | None = None
    """Routed experts that each layer keeps; or give `ratio`."""
    ratio: float | None = None
    """Share of the routed experts that goes; or give `experts`."""
    method: PrunerField = "reap"
    """Which experts stay."""
    recovery: Literal["closed-form", "none"] = "closed-form"
    """Whether the kept experts' down-projections are fitted to what all experts said."""
    calibration: tuple[str, ...] = ()
    """Text files, .jsonl files or `datasets` names; none means the bundled text."""
    tokens: int = 16_384
    """Calibration tokens."""
    window: int = 256
    """Tokens in one calibration sequence."""
    held_out_tokens: int = 4_096
    """Tokens of bundled held-out text for the perplexity before and after."""
    device: str = "auto"
    seed: int = 0
    collapse_ratio: float = 100.0
    """Perplexity above this many times the source's is a collapse."""
