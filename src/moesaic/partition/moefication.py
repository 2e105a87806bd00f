"""Neurons with similar weights share an expert: MoEfication's parameter clustering (Zhang et al., ACL-F 2022, §3.2)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from ..calibration.sample import LayerSample
from ..config import Plan
from ._assignment import groups
from .base import Partition, Partitioner
from .coactivation import balanced_kmeans


@dataclass(frozen=True, kw_only=True)
class MoEfication(Partitioner):
    """Balanced k-means on unit rows of Wg; no activations are looked at.

    The paper shares no neurons; where the plan does, they are the most salient ones, as in `coactivation`.
    """

    default_router: ClassVar[str] = "mlp"

    iterations: Annotated[int, Field(gt=0)] = 8
    """Rounds of balanced k-means."""

    def split(self, sample: LayerSample, plan: Plan, generator: torch.Generator) -> Partition:
        _, _, saliency_F = sample.moments()
        order_F = saliency_F.argsort(descending=True, stable=True)
        shared, routed = order_F.split([plan.shared_width, len(order_F) - plan.shared_width])
        shared = shared.sort().values
        if not plan.num_experts:
            return Partition(shared=shared, experts=routed[:0].view(0, 0))
        rows_RD = normalize(sample.ffn.gate_FD[routed].float(), dim=1)
        expert_R = balanced_kmeans(rows_RD, plan.num_experts, self.iterations, generator)
        return Partition(shared=shared, experts=groups(expert_R.to(routed.device), routed, plan.num_experts))
