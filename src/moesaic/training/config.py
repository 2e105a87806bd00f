"""What a training is asked to do; saved with its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .. import registry
from ..config import build_config, read_recipe


class FinetuneConfig(BaseModel):
    """Everything that decides a training's result but the model, the teacher and the time that `minutes` give."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "lora"
    """What trainable_names: `lora`, `full`, `router`, or a published method; with options, `lora:rank=16`."""
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

    @field_validator("method", mode="before")
    @classmethod
    def _spec(cls, value: Any) -> Any:
        """Python may give a method's instance, e.g. `method=Lora(rank=16)`."""
        return value if isinstance(value, str) else registry.spec(value)


def make_config(recipe: Path | None, settings: dict[str, Any]) -> FinetuneConfig:
    """A configuration from a YAML recipe (or a saved `moesaic.yaml`) and settings that override it.

    `rank` and `alpha` are short for options of the method.

    Raises:
        InputError: no such file, an unknown setting (with the nearest name) or a value that does not fit.
    """
    content = read_recipe(recipe, "finetune", FinetuneConfig) | settings
    adapters = [f"{name}={content.pop(name)}" for name in ("rank", "alpha") if name in content]
    if adapters:
        method = content.get("method", FinetuneConfig().method)
        content["method"] = method + ("," if ":" in method else ":") + ",".join(adapters)
    config = build_config(FinetuneConfig, content)
    registry.build("method", config.method)
    return config
