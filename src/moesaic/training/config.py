"""What a training is asked to do; saved with its output."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .. import registry


class FinetuneConfig(BaseModel):
    """Everything that decides a training's result but the model, the teacher and the time that `minutes` give."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "lora"
    """What learns: `lora`, `full`, `router`, or a published method; with options, `lora:rank=16`."""
    objective: Literal["lm", "distill", "both"] = "distill"
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
    batch: int = Field(8, gt=0)
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
    held_out: int = Field(16, gt=0)
    """Sequences of the data that are not trained on and decide which state is kept."""
    evaluations: int = Field(8, gt=0)
    """How often the held-out loss is measured on the way."""
    patience: int = Field(3, gt=0)
    """Evaluations in a row without a new least held-out loss after which training stops."""
    device: str = "auto"
    seed: int = 0

    @field_validator("method", mode="before")
    @classmethod
    def _spec(cls, value: Any) -> Any:
        """Python may give a method's instance, e.g. `method=Lora(rank=16)`."""
        return value if isinstance(value, str) else registry.spec(value)
