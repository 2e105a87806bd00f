"""The contract of a baseline: it is checked before any work, measured like a conversion, and says what its speed is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from transformers import PreTrainedModel

from ...calibration.chat import default_sources
from ...checkpoint.sources import resolve
from ...errors import InputError
from ...models.integrity import read_config
from ...models.tokenizer import load_tokenizer
from ...results import EvaluationResult, FrontierRow
from ..rows import Measurement, Point

BATCH_1 = "batch 1 only: each token reads its own rows or columns; no runtime here, so speed is the bytes' limit"
"""What the rows of methods say that skip weights by single neurons or inputs."""


def calibration(model: str, measurement: Measurement) -> tuple[str, ...]:
    """Name the calibration text: what is given, else what a conversion of the model would take by itself."""
    if measurement.calibration:
        return measurement.calibration
    folder = resolve(model)
    rows = read_config(folder).get_text_config().vocab_size
    return default_sources(load_tokenizer(folder), rows)


class UndefinedBudget(InputError):
    """A budget at which a method does not exist; it may at others."""


Alter = Callable[[PreTrainedModel], AbstractContextManager[object]]
"""Makes a loaded dense model the baseline, and dense again on leaving."""


class Evaluate(Protocol):
    """The harness's own measurement of a model, or of one that is altered when it is loaded."""

    def __call__(self, model: str | Path, alter: Alter | None = None) -> EvaluationResult: ...


@dataclass(frozen=True)
class Request:
    """What is to be measured."""

    model: str
    point: Point
    measurement: Measurement
    work: Path
    """A folder for what is made on the way; unfinished work there is gone on with."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a row says of a baseline beside its quality; fields are the row's."""

    ffn_active: float
    """The share of the FFNs' weights at which a conversion reads as much for a token."""
    active_parameters: int | None = None
    """Weights that a decoding step of one token reads, an embedding that is only looked up left out."""
    plan: str | None = None
    expert_width: int | None = None
    memory: float | None = None
    speedup: float | None = None
    speed_is: str | None = None
    """`limit` where `speedup` is what the bytes allow; None: it is measured later, or unknown."""
    bound: str | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None

    def on(self, row: FrontierRow) -> FrontierRow:
        """Write it on a row."""
        return replace(
            row, ffn_active=self.ffn_active, active_parameters=self.active_parameters, plan=self.plan,
            expert_width=self.expert_width, memory=self.memory, speedup=self.speedup, speed_is=self.speed_is,
            bound=self.bound, seconds=self.seconds, peak_rss_bytes=self.peak_rss_bytes,
        )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A baseline, measured."""

    found: EvaluationResult
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Baseline(ABC):
    """A method that is no conversion; hyper-parameters are its fields."""

    recovery: Literal["closed-form", "none"] = "none"

    @property
    def calibrated(self) -> bool:
        """Whether it learns from the calibration text."""
        return True

    @abstractmethod
    def check(self, model: str, point: Point, measurement: Measurement) -> None:
        """Check that it can be made, before any costly work.

        Raises:
            UndefinedBudget: not with so few bytes.
            InputError: not of this model, or not from this text.
        """

    @abstractmethod
    def measure(self, request: Request, evaluate: Evaluate) -> Measured:
        """Make it and measure it."""
