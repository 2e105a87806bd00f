"""CMoE's partition (arXiv 2502.04416, §3.2): shared experts by activation rate, routed ones by balanced clustering.

Shapes: T tokens, F neurons, R routed neurons, E experts, K neurons that count as active in a token.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ..calibration.activations import LayerActivations
from ..plan import Plan
from ._assignment import balanced_assignment, groups
from .base import Partition, Partitioner

CHUNK_NEURONS = 1_024


@dataclass(frozen=True, kw_only=True)
class CMoE(Partitioner):
    """Clusters the binary columns that tell in which tokens a neuron is among the `top_k` of largest |h| (ATopK).

    Activations are those of the normalised FFN input and weight rows. Initial centroids are the columns of the most
    active routed neurons; assignment minimises the L1 distance exactly, with clusters of equal size; the neuron nearest
    to its centroid represents the expert.
    """

    default_router: ClassVar[str] = "representative"

    top_k: Annotated[int, Field(gt=0)] = 10
    """Neurons of a token that count as active; CMoE's K_a."""
    iterations: Annotated[int, Field(gt=0)] = 4
    """Rounds of balanced k-means."""
    final_centroids: bool = False
    """Whether a representative is nearest to the mean of the neurons assigned last, as in CMoE's code, which has one
    round; else to the centroid that they were assigned to."""

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        active_FT = active_neurons(sample, self.top_k)
        rate_F = active_FT.float().mean(1)
        order_F = rate_F.argsort(descending=True, stable=True)
        shared, routed = order_F.split([plan.shared_width, len(order_F) - plan.shared_width])
        if not plan.num_experts:
            return Partition(shared=shared.sort().values, experts=routed[:0].view(0, 0))
        column_RT = active_FT[routed]
        centers_ET = column_RT[: plan.num_experts].float()
        expert_R = balanced_assignment(l1_distance(column_RT, centers_ET)).to(routed.device)
        for _ in range(self.iterations - 1):
            centers_ET = centroids(column_RT, expert_R, plan.num_experts)
            expert_R = balanced_assignment(l1_distance(column_RT, centers_ET)).to(routed.device)
        if self.final_centroids:
            centers_ET = centroids(column_RT, expert_R, plan.num_experts)
        own_R = l1_distance(column_RT, centers_ET).gather(1, expert_R[:, None]).squeeze(1)
        nearest = [routed[torch.where(expert_R == e, own_R, torch.inf).argmin()] for e in range(plan.num_experts)]
        return Partition(
            shared=shared.sort().values,
            experts=groups(expert_R, routed, plan.num_experts),
            representatives=torch.stack(nearest),
        )


def active_neurons(sample: LayerActivations, top_k: int) -> Tensor:
    """Tell which neurons are among a token's `top_k` largest |h| of normalised input and weights, bool [F, T]."""
    ffn = sample.ffn
    unit = replace(ffn, gate_FD=normalize(ffn.gate_FD.float()), up_FD=normalize(ffn.up_FD.float()))
    active_FT = torch.zeros(ffn.intermediate_size, sample.tokens, dtype=torch.bool, device=sample.input_TD.device)
    scaled = replace(sample, ffn=unit, input_TD=normalize(sample.input_TD.float()))
    for part, h_CF in scaled.chunks():
        top_CK = h_CF.abs().topk(min(top_k, h_CF.shape[1]), dim=1).indices
        active_FT[:, part] = torch.zeros_like(h_CF, dtype=torch.bool).scatter_(1, top_CK, True).T
    return active_FT


def centroids(column_RT: Tensor, expert_R: Tensor, experts: int) -> Tensor:
    """Average the columns of each expert's neurons, of which all have as many, float32 [E, T]."""
    sums_ET = torch.zeros(experts, column_RT.shape[1], device=column_RT.device)
    for expert_C, column_CT in zip(expert_R.split(CHUNK_NEURONS), column_RT.split(CHUNK_NEURONS), strict=True):
        sums_ET.index_add_(0, expert_C, column_CT.float())
    return sums_ET * experts / len(column_RT)


def l1_distance(column_RT: Tensor, center_ET: Tensor) -> Tensor:
    """Compute `sum_t |a_rt - c_et|` of binary columns a (any dtype) and centers c in [0, 1], float32 [R, E].

    Equals `torch.cdist(column_RT, center_ET, p=1)`: where a is 0 the term is c, where a is 1 it is 1 - c.
    """
    center_TE = center_ET.float().T
    parts = (column_CT.float() for column_CT in column_RT.split(CHUNK_NEURONS))
    return torch.cat([a.sum(1, keepdim=True) + center_TE.sum(0) - 2 * (a @ center_TE) for a in parts])
