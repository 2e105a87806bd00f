"""Experts for kinds of token, each with the neurons that matter most to its tokens.

Shapes: T tokens, D hidden size, F neurons, E specialists, I neurons of one.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ..calibration.activations import LayerActivations
from ..plan import Plan
from ._alternation import alternate, index_sets, memberships
from .base import Partition, Partitioner


@dataclass(frozen=True, kw_only=True)
class Specialists(Partitioner):
    """Spherical k-means on the FFN's input; a specialist has the most salient neurons of its cluster, overlap allowed.

    From there neurons and a linear router without constants, which every stock architecture can hold, alternate
    (`_alternation.py`). Shared neurons are the most salient over all tokens and are in no specialist.
    """

    default_router: ClassVar[str] = "linear:intercept=False"
    overlapping: ClassVar[bool] = True

    profile_tokens: Annotated[int, Field(gt=0)] = 16_384
    """Tokens that are clustered and whose neurons are weighed."""
    iterations: Annotated[int, Field(gt=0)] = 20
    """Rounds of k-means."""
    alternations: Annotated[int, Field(ge=0)] = 20
    """Rounds, at most, in which a router fitted to the specialists so far sends the tokens, and each specialist takes
    the neurons that its new tokens need most; 0 leaves those of the clusters, for `--router centroid`."""

    @property
    def token_clusters(self) -> bool:
        return not self.alternations

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        sample = sample.subsample(self.profile_tokens, generator)
        unit_TD = normalize(sample.input_TD.float(), dim=1)
        centroids_ED = spherical_kmeans(unit_TD, plan.num_experts, self.iterations, generator)
        cluster_T = (unit_TD @ centroids_ED.T).argmax(1)
        saliency_EF = cluster_saliency(sample, cluster_T, plan.num_experts)
        shared = saliency_EF.sum(0).topk(plan.shared_width).indices.sort().values
        saliency_EF[:, shared] = -torch.inf
        experts_EI = saliency_EF.topk(plan.width, dim=1).indices.sort(dim=1).values
        if self.token_clusters:
            return Partition(shared=shared, experts=experts_EI, centroids_ED=centroids_ED)
        neurons = sample.ffn.intermediate_size

        def reassign(captured_FX: Tensor) -> Tensor:
            captured_FX[shared] = -torch.inf
            return memberships(captured_FX[:, :-1].topk(plan.width, dim=0).indices.T, neurons)

        member_FE = alternate(
            sample, memberships(experts_EI, neurons), plan.num_experts_per_tok, self.alternations, reassign
        )
        return Partition(shared=shared, experts=index_sets(member_FE, plan.width))


def spherical_kmeans(unit_TD: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Find unit centroids [clusters, D] of unit vectors [T, D].

    A cluster that runs empty restarts at the worst-served token.
    """
    first = torch.randperm(len(unit_TD), generator=generator)[:clusters]
    centroids_ED = unit_TD[first]
    for _ in range(iterations):
        best = (unit_TD @ centroids_ED.T).max(1)
        sums_ED = torch.zeros_like(centroids_ED).index_add_(0, best.indices, unit_TD)
        empty = torch.bincount(best.indices, minlength=clusters) == 0
        sums_ED[empty] = unit_TD[best.values.topk(int(empty.sum()), largest=False).indices]
        centroids_ED = normalize(sums_ED, dim=1)
    return centroids_ED


def cluster_saliency(sample: LayerActivations, cluster_T: Tensor, clusters: int) -> Tensor:
    """Compute `sum_{t in e} (w_t h_ti)² ‖Wd_i‖²` of each neuron in each cluster, float32 [clusters, F]."""
    saliency_EF = torch.zeros(clusters, sample.ffn.intermediate_size, device=sample.input_TD.device)
    for part, h_CF in sample.chunks():
        value_CF = (h_CF.float() * sample.weight_T[part, None]).square()
        saliency_EF.index_add_(0, cluster_T[part], value_CF)
    return saliency_EF * sample.ffn.down_DF.float().square().sum(0)
