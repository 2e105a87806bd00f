"""What a light training is asked to do."""

from __future__ import annotations

from typing import ClassVar, Literal

from .. import given, registry
from ..results import Json
from .settings import MethodField, Settings


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
    """Text files, .jsonl files (`text`, or `prompt` and `response`) or `datasets` names; none: what the conversion was
    calibrated on if that was bundled (`bundled`, `answers`), else the bundled text."""
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
    """Learning rate of all parameters but the routers'; None is the method's own."""
    router_learning_rate: float | None = None
    """Learning rate of the routers; None is the method's own."""
    warmup: float = 0.05
    """Share of the training in which the learning rate rises; then it falls as a cosine to a tenth."""
    top_k: int = 64
    """How many of the teacher's largest logits are kept; the rest of the probability is one more class."""
    match: float = 0.0
    """Weight of the relative squared distance of each layer's output from the teacher's."""
    balance: Literal["none", "bias", "loss"] | None = None
    """Evening out the experts' load: by the selection bias (CMoE, DeepSeek-V3), by a loss (Switch), or not; None is the
    method's own, mostly `none`."""
    balance_step: float = 1e-3
    """How far the bias moves in a step with `balance: bias` (CMoE's γ)."""
    balance_weight: float = 0.01
    """Weight of the balance loss with `balance: loss`, in nats a token (Switch's α)."""
    locality: float = 0.0
    """Weight of the divergence from the experts of the token before (LocMoE, ReMoE); and what it is worth, in nats of
    held-out loss, that a token keeps its experts, when the best state is chosen."""
    held_out: int = 12
    """Sequences of the data that are not trained on and decide which state is kept."""
    evaluations: int = 6
    """How often the held-out loss is measured on the way."""
    patience: int = 3
    """Evaluations in a row without a new least held-out loss after which training stops."""
    shard: bool = False
    """Whether processes hold a part of each parameter (FSDP) instead of all of them (DDP)."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    seed: int = 0
    """Seed of every random draw: the same one gives the same result on the same machine."""

    @classmethod
    def combine(cls, recipe: Json, settings: Json) -> Json:
        """Override the settings of a recipe; `rank`, `alpha` and `rounds` are short for options of the method."""
        content = recipe | settings
        short = ("rank", "alpha", "rounds")
        given.check(**{name: content.get(name) for name in short})
        adapters = [f"{name}={content.pop(name)}" for name in short if name in content]
        if adapters:
            method = registry.text("method", content.get("method", cls().method))
            options = [registry.split("method", method)[1], *adapters]
            name = method.removesuffix(f":{options[0]}")
            content["method"] = f"{name}:{','.join(filter(None, options))}"
            registry.build("method", content["method"])
        return content
