"""What a conversion and a training are asked to do, resolved from options and recipes and saved beside their output."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from . import registry
from .errors import InputError
from .results import Json


def _checked(stage: str, given: object) -> object:
    return given if given is None or isinstance(given, str) else registry.build(stage, given)


def _written(stage: str, given: object) -> str | None:
    return None if given is None else registry.text(stage, given)


def _field(stage: str) -> tuple[BeforeValidator, PlainSerializer]:
    """Say how a field that holds a method is read and written: its text, or the object, written as its text."""
    return BeforeValidator(partial(_checked, stage)), PlainSerializer(partial(_written, stage))


PartitionField = Annotated[object, *_field("partition")]
RouterField = Annotated[object, *_field("router")]
SelectionField = Annotated[object, *_field("selection")]
RecoveryField = Annotated[object, *_field("recovery")]
FormatField = Annotated[object, *_field("format")]
MethodField = Annotated[object, *_field("method")]


class Settings(BaseModel):
    """Settings that come from Python, from options, or from a YAML recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    section: ClassVar[str]
    """Where they stand in a saved `moesaic.yaml`."""

    @classmethod
    def read(cls, recipe: Path | None, given: Json) -> Self:
        """Take settings from a YAML recipe (or a saved `moesaic.yaml`), overridden by those that are given.

        Raises:
            InputError: no such file, an unknown setting (with the nearest name) or a value that does not fit.
        """
        try:
            return cls.model_validate(cls.combine(cls._recipe(recipe), given))
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
                raise cause from error
            name = "--" + str(first["loc"][0]).replace("_", "-")
            raise InputError(f"{name} is {first['input']!r}: {first['msg'].lower()}") from error

    @classmethod
    def combine(cls, recipe: Json, given: Json) -> Json:
        """Override the settings of a recipe by those that are given."""
        return recipe | given

    @classmethod
    def _recipe(cls, recipe: Path | None) -> Json:
        if recipe is None:
            return {}
        if not recipe.is_file():
            raise InputError(f"no recipe '{recipe}'")
        try:
            content = yaml.safe_load(recipe.read_text()) or {}
            content = dict(content.get(cls.section, content))
        except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"'{recipe}' is not a YAML mapping of settings: {error}") from error
        for name in content:
            if name not in cls.model_fields:
                hint = registry.nearest(str(name), cls.model_fields)
                raise InputError(f"'{recipe}' has an unknown setting '{name}'.{hint}")
        return content

    def to_yaml(self) -> str:
        """Write all settings as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class ConvertConfig(Settings):
    """Everything that decides a conversion's result; saved as `moesaic.yaml` with the output."""

    section: ClassVar[str] = "config"

    active: float | None = None
    """The ffn share: the part of each FFN's neurons that one token runs; the shape follows from it."""
    memory_factor: float = Field(1.0, gt=0)
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
    tokens: int = Field(16_384, gt=0)
    """Calibration tokens."""
    window: int = Field(256, gt=1)
    """Tokens in one calibration sequence."""
    first_tokens: int | None = Field(None, ge=0)
    """Tokens, each a text's first, that recovery fits beside the others; None: an eighth of `tokens`, 0 after a BOS."""
    held_out_tokens: int = Field(4_096, gt=0)
    """Tokens of bundled held-out text for the perplexity that is compared with the dense model's."""
    format: FormatField = "auto"
    """`moesaic` (which holds everything), `glm4_moe` and other stock architectures, or `auto`: the first that fits."""
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    collapse_ratio: float = 100.0
    """Perplexity above this many times the dense model's is a collapse."""

    @classmethod
    def combine(cls, recipe: Json, given: Json) -> Json:
        """Override the settings of a recipe; a given share takes the place of a plan, and a given plan of a share."""
        for name, other in (("plan", "active"), ("active", "plan")):
            if name in given:
                recipe.pop(other, None)
        return recipe | given


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
    samples: int = Field(2_000, gt=0)
    """Sequences that training may use; fewer if the data has fewer."""
    window: int = Field(512, gt=1)
    """Tokens in a sequence."""
    steps: int | None = Field(None, gt=0)
    """Steps in all; None is what `minutes` allow, or else one pass over the samples."""
    minutes: float | None = Field(None, gt=0)
    """Minutes in all; a step that has begun is finished."""
    batch: int = Field(2, gt=0)
    """Sequences in a step, over all processes."""
    learning_rate: float | None = Field(None, ge=0)
    """Of all but the routers; None is the method's own."""
    router_learning_rate: float | None = Field(None, ge=0)
    """Of the routers; None is the method's own."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the training in which the learning rate rises; then it falls as a cosine to a tenth."""
    top_k: int = Field(64, gt=0)
    """Of the teacher's logits, the largest that are kept; the rest of the probability is one more class."""
    match: float = Field(0.0, ge=0)
    """Weight of the relative squared distance of each layer's output from the teacher's."""
    balance: Literal["none", "bias", "loss"] = "none"
    """Evening out the experts' load: by the selection bias (CMoE, DeepSeek-V3), by a loss (Switch), or not."""
    balance_step: float = Field(1e-3, gt=0)
    """Of `bias`: how far it moves in a step (CMoE's γ)."""
    balance_weight: float = Field(0.01, gt=0)
    """Of `loss`: its weight in nats a token (Switch's α)."""
    held_out: int = Field(12, gt=0)
    """Sequences of the data that are not trained on and decide which state is kept."""
    evaluations: int = Field(6, gt=0)
    """How often the held-out loss is measured on the way."""
    patience: int = Field(3, gt=0)
    """Evaluations in a row without a new least held-out loss after which training stops."""
    shard: bool = False
    """Whether processes hold a part of each parameter (FSDP) instead of all of them (DDP)."""
    device: str = "auto"
    seed: int = 0

    @classmethod
    def combine(cls, recipe: Json, given: Json) -> Json:
        """Override the settings of a recipe; `rank` and `alpha` are short for options of the method."""
        content = recipe | given
        adapters = [f"{name}={content.pop(name)}" for name in ("rank", "alpha") if name in content]
        if adapters:
            method = registry.text("method", content.get("method", cls().method))
            options = [registry.split("method", method)[1], *adapters]
            name = method.removesuffix(f":{options[0]}")
            content["method"] = f"{name}:{','.join(filter(None, options))}"
            registry.build("method", content["method"])
        return content
