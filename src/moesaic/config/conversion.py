"""What a conversion is asked to do."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..results import Json
from .settings import FormatField, PartitionField, RecoveryField, RouterField, SelectionField, Settings


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
    engine: str | None = None
    """The engine that is to run it, `--for` on the command line: its width of groups, format and file follow."""
    outtype: str | None = None
    """llama.cpp's type of weights, `q8_0` or another; None: the one that measurements say."""
    dense_layers: str | None = None
    """Layers that keep their dense FFN: `0,2,5-7`, `odd` (MoE-LLaVA's every second one) or `even`; counted from 0."""
    partition: PartitionField = "auto"
    """Partitioning method; `auto` tries `specialists` and `coactivation` on part of the model and takes the better."""
    router: RouterField = None
    """Routing method; None takes the one that belongs to the partition."""
    selection: SelectionField = None
    """Which and how many experts run by their scores; None takes the one that belongs to the router, mostly `top-k`."""
    recovery: RecoveryField = None
    """Winning back quality at once; None takes what belongs to the partition, mostly `closed-form`."""
    calibration: tuple[str, ...] = ()
    """Text files, .jsonl files or `datasets` names, `bundled`, `answers` or `self`; none: the bundled text, and for a
    model with a chat template `answers` too."""
    for_use: Literal["code", "chat", "text"] | None = None
    """What the model is for, which chooses the calibration text where none is named; None: by the model."""
    image_weight: float = 0.25
    """What an error in a picture's token is worth, relative to one in a token of text; vision-language models only."""
    text_only: bool = False
    """Whether of a vision-language model the text model in it is converted, and its pictures are given up."""
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
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: str = "auto"
    """Dtype of the weights that are written: `auto` (the checkpoint's), `bfloat16`, `float16`, `float32`, ..."""
    seed: int = 0
    """Seed of every random draw: the same one gives the same result on the same machine."""
    collapse_ratio: float = 100.0
    """Perplexity above this many times the dense model's is a collapse; of answers about pictures too."""

    @classmethod
    def combine(cls, recipe: Json, settings: Json) -> Json:
        """Override the settings of a recipe; a given share takes the place of a plan, and a given plan of a share."""
        for name, other in (("plan", "active"), ("active", "plan")):
            if name in settings:
                recipe.pop(other, None)
        return recipe | settings
