"""What every training loop here goes by: when it is over, and which sequences a step has.

Shapes: B sequences in a step.
"""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import AdaptConfig, FinetuneConfig
from .data import Samples, step_sequences
from .state import StepState

Config = TypeVar("Config", FinetuneConfig, AdaptConfig)


class StepLoop(Generic[Config]):
    """Steps over samples, as many as `steps` or `minutes` allow, or else one pass."""

    config: Config
    train: Samples
    accelerator: Accelerator

    def progress(self, state: StepState) -> float:
        """Compute the share of the training that is done, by `steps` or `minutes`, whichever is over first."""
        steps, minutes = self.config.steps, self.config.minutes
        if steps is None and minutes is None:
            steps = math.ceil(len(self.train) / self.config.batch)
        return max(state.step / steps if steps else 0.0, state.seconds / (60 * minutes) if minutes else 0.0)

    def agreed(self, seconds: float) -> float:
        """Average over processes, so that all of them stop after the same step."""
        return self.accelerator.reduce(torch.tensor(seconds, device=self.accelerator.device), "mean").item()

    def sequences(self, step: int) -> Tensor:
        """List the numbers of a step's sequences, int64 [B]."""
        return step_sequences(len(self.train), self.config.batch, step, self.config.seed)
