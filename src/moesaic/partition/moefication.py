"""Neurons with similar weights share an expert: MoEfication's parameter clustering (Zhang et al., ACL-F 2022, §3.2)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from ..calibration.activations import LayerActivations
from ..plan import Plan
from .base import Partition, Partitioner
from .coactivation import cluster_neurons


@dataclass(frozen=True, kw_only=True)
class MoEfication(Partitioner):
    """Balanced k-means on unit rows of Wg; no activations are looked at.

    The paper shares no neurons; where the plan does, they are the most salient ones, as in `coactivation`.
    """

    default_router: ClassVar[str] = "mlp"

    iterations: Annotated[int, Field(gt=0)] = 8
    """Rounds of balanced k-means."""

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        _, _, saliency_F = sample.moments()
        rows_FD = normalize(sample.ffn.gate_FD.float(), dim=1)
        return cluster_neurons(saliency_F, rows_FD, plan, self.iterations, generator)
