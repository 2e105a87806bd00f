"""The contract of a pruning method.

Shapes: T tokens, E routed experts, N experts that are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..sample import BlockSample


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a layer's experts."""

    experts: Tensor
    """Their numbers in the source, ascending, int64 [N]."""
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    """New values of parameters of the experts' module, [N, ...] each; the others are the kept experts' own."""


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """A method that chooses the experts of one layer that stay; hyper-parameters are its fields."""

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


def best(score_E: Tensor, keep: int, groups: int = 1) -> Tensor:
    """Find the `keep` experts of the largest scores, as many in each group: their numbers, ascending, int64 [N].

    Of equal scores the first stays.
    """
    order_GE = score_E.double().cpu().view(groups, -1).argsort(dim=1, descending=True, stable=True)
    first_G1 = torch.arange(groups)[:, None] * order_GE.shape[1]
    return (order_GE[:, : keep // groups] + first_G1).flatten().sort().values
