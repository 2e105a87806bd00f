"""What is asked of making the number of experts vary by token."""

from __future__ import annotations

from typing import ClassVar

from .settings import LearnerField, SelectionField, Settings


class AdaptConfig(Settings):
    """Everything that decides an adapter but the model and the time that `minutes` give."""

    section: ClassVar[str] = "adapt"

    method: SelectionField = "learned-threshold"
    """How many experts run for a token: a selection, with options `relative:at_least=2`."""
    learner: LearnerField = None
    """What trains a selection that learns; None is the one that belongs to it."""
    target_active: float = 0.7
    """Share of the model's own number of experts that runs on average."""
    data: tuple[str, ...] = ()
    """Text files, .jsonl files (`text`, or `prompt` and `response`) or `datasets` names; none: the bundled text."""
    samples: int = 1_000
    """Sequences that training may use; fewer if the data has fewer."""
    window: int = 256
    """Tokens in a sequence."""
    tokens: int = 8_192
    """On which the selection is brought to its budget, of the samples."""
    steps: int | None = None
    """Steps in all; None is what `minutes` allow, or else one pass over the samples."""
    minutes: float | None = None
    """Minutes of training; a step that has begun is finished."""
    batch: int = 4
    """Sequences in a step, over all processes."""
    learning_rate: float | None = None
    """None is the learner's own."""
    held_out: int = 24
    """Sequences of the data that are not trained on, on which the result is measured."""
    evaluations: int = 20
    """How often the training's state is kept on the way."""
    allow_zero: bool = False
    """Whether a token may run no routed expert, where there is a shared one."""
    inside: bool = False
    """Whether to write a converted model with the selection in it, in place of an adapter: in moesaic's own format, or
    with `top-k` in the one that it has."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: str = "auto"
    """In which the model runs; what learns is float32."""
    seed: int = 0
    """Seed of every random draw: the same one gives the same result on the same machine."""
