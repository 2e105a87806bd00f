"""Neurons that matter for the same tokens share an expert: balanced k-means on activation profiles.

Shapes: T tokens, F neurons, R routed neurons, E experts.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..calibration.sample import LayerSample
from ..config import Plan
from ._assignment import balanced_assignment, groups
from .base import Partition, Partitioner


@dataclass(frozen=True, kw_only=True)
class Coactivation(Partitioner):
    """Shared are the most salient neurons; the others are clustered by when they matter (design: moesaic's own).

    A neuron's profile is the unit-norm centred vector of `(w_t h_t ‖Wd‖)²` over a sample of tokens.
    """

    profile_tokens: Annotated[int, Field(gt=0)] = 2_048
    """Tokens in a profile."""
    iterations: Annotated[int, Field(gt=0)] = 8
    """Rounds of balanced k-means."""

    def split(self, sample: LayerSample, plan: Plan, generator: torch.Generator) -> Partition:
        few = sample.subsample(self.profile_tokens, generator)
        h_TF = torch.cat([h_CF.float() for _, h_CF in few.chunks()])
        value_TF = (few.weight_T[:, None] * h_TF * sample.ffn.down_DF.float().norm(dim=0)).square()
        return cluster_neurons(value_TF.mean(0), profiles(value_TF), plan, self.iterations, generator)


def profiles(value_TF: Tensor) -> Tensor:
    """Each neuron's values over the tokens as a centred unit vector, [F, T]."""
    centred_FT = (value_TF - value_TF.mean(0)).T
    return torch.nn.functional.normalize(centred_FT, dim=1)


def cluster_neurons(
    score_F: Tensor, points_FX: Tensor, plan: Plan, iterations: int, generator: torch.Generator
) -> Partition:
    """Shared are the neurons of greatest score; the others are grouped by balanced k-means on their unit vectors."""
    order_F = score_F.argsort(descending=True, stable=True)
    shared, routed = order_F.split([plan.shared_width, len(order_F) - plan.shared_width])
    shared = shared.sort().values
    if not plan.num_experts:
        return Partition(shared=shared, experts=routed[:0].view(0, 0))
    expert_R = balanced_kmeans(points_FX[routed], plan.num_experts, iterations, generator)
    return Partition(shared=shared, experts=groups(expert_R.to(routed.device), routed, plan.num_experts))


def balanced_kmeans(points_RT: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """The cluster of each unit vector, int64 [R], all clusters of equal size (spherical k-means, exact assignment)."""
    centers_ET = kmeans_plus_plus(points_RT, clusters, generator)
    expert_R = torch.full((len(points_RT),), -1)
    for _ in range(iterations):
        previous = expert_R
        expert_R = balanced_assignment(1 - points_RT @ centers_ET.T)
        if torch.equal(previous, expert_R):
            break
        sums_ET = torch.zeros_like(centers_ET).index_add_(0, expert_R.to(points_RT.device), points_RT)
        centers_ET = torch.nn.functional.normalize(sums_ET, dim=1)
    return expert_R


def kmeans_plus_plus(points_RT: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Seeds drawn one after another with probability proportional to the distance from those before."""
    chosen = [int(torch.randint(len(points_RT), (), generator=generator))]
    distance_R = 1 - points_RT @ points_RT[chosen[0]]
    while len(chosen) < clusters:
        chances_R = distance_R.clamp(min=1e-12).cpu()
        chosen.append(int(torch.multinomial(chances_R, 1, generator=generator)))
        distance_R = torch.minimum(distance_R, 1 - points_RT @ points_RT[chosen[-1]])
    return points_RT[chosen]
