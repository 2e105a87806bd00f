"""The contract of a pruning method.

Shapes: T tokens, E routed experts, N experts that are kept, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..sample import BlockSample


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """A method of leaving something out; hyper-parameters are its fields."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a layer's experts."""

    experts: Tensor
    """Their numbers in the source, ascending, int64 [N]."""
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    """New values of parameters of the experts' module, [N, ...] each; the others are the kept experts' own."""


@dataclass(frozen=True, kw_only=True)
class Pruner(PruningMethod, ABC):
    """A method that chooses the experts of one layer that stay."""

    knows_groups: ClassVar[bool] = True
    """Whether it can keep the same number of experts in each of several routing groups."""
    reads_neurons: ClassVar[bool] = False
    """Whether it reads experts' matrices neuron by neuron, whose order must be known."""

    @abstractmethod
    def select(self, sample: BlockSample, keep: int, generator: torch.Generator) -> Kept:
        """Choose `keep` of the experts.

        Args:
            sample: one layer's block and its calibration tokens.
            keep: how many experts stay, fewer than there are; a multiple of `sample.groups`.
            generator: the source of everything random.
        """


@dataclass(frozen=True, kw_only=True)
class LayerPruner(PruningMethod, ABC):
    """A method that chooses the decoder layers that go, by what runs of layers do to the residual stream."""

    heal_all: bool = True
    """Whether recovery fits every layer after the first that goes, or only the one before each gap."""

    @abstractmethod
    def span(self, drop: int) -> int:
        """Say how many layers in a row are judged together where `drop` layers go; 1 is each for itself."""

    @abstractmethod
    def distance(self, before_TD: Tensor, after_TD: Tensor) -> Tensor:
        """Measure what the layers in between do to each token's residual stream: float32 [T]."""

    @abstractmethod
    def choose(self, distances: Sequence[float], drop: int) -> list[int]:
        """Choose `drop` layers.

        Args:
            distances: the mean over tokens of `distance` across the `span` layers that begin at each layer.
            drop: how many layers go.

        Returns:
            Their numbers, ascending.
        """


def best(score_E: Tensor, keep: int, groups: int = 1) -> Tensor:
    """Find the `keep` experts of the largest scores, as many in each group: their numbers, ascending, int64 [N].

    Of equal scores the first stays.
    """
    order_GE = score_E.double().cpu().view(groups, -1).argsort(dim=1, descending=True, stable=True)
    first_G1 = torch.arange(groups)[:, None] * order_GE.shape[1]
    return (order_GE[:, : keep // groups] + first_G1).flatten().sort().values
