"""Neurons that the input says matter together share an expert, and move to where the router sends their tokens.

Shapes: T tokens, D hidden size, F neurons, R routed neurons, E experts, X coordinates of a point.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ..calibration.activations import LayerActivations
from ..plan import Plan
from ._alternation import alternate, index_sets, memberships, squares_dtype
from ._assignment import balanced_assignment, groups
from .base import Partition, Partitioner


@dataclass(frozen=True, kw_only=True)
class Coactivation(Partitioner):
    """Balanced k-means of neurons by when a *linear* function of x says they matter, the most salient ones shared.

    A router is linear, so what it cannot predict of a neuron's importance is noise to the cut. From there neurons and
    router alternate (`_alternation.py`); shared are in the end those that any router would miss most.
    """

    ridge: Annotated[float, Field(gt=0)] = 1e-2
    """Ridge of the prediction, relative to the mean variance of the input's channels."""
    iterations: Annotated[int, Field(gt=0)] = 8
    """Rounds of balanced k-means."""
    alternations: Annotated[int, Field(ge=0)] = 20
    """Rounds, at most, in which all neurons, the shared ones too, move to where a router fitted to the groups so far
    sends the tokens that need them."""
    alternation_tokens: Annotated[int, Field(gt=0)] = 16_384
    """Tokens that take part in them."""

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        saliency_F, points_FD = predicted_importance(sample, self.ridge)
        partition = cluster_neurons(saliency_F, normalize(points_FD, dim=1), plan, self.iterations, generator)
        if not (self.alternations and plan.num_experts):
            return partition
        size_E = [plan.width] * plan.num_experts + [plan.shared_width] * bool(plan.shared)

        def reassign(captured_FX: Tensor) -> Tensor:
            expert_F = balanced_assignment(-captured_FX[:, : len(size_E)], size_E).to(captured_FX.device)
            return one_hot(expert_F, plan.num_experts + 1)[:, :-1].float()

        member_FE = alternate(
            sample.subsample(self.alternation_tokens, generator), memberships(partition.experts, len(saliency_F)),
            plan.num_experts_per_tok, self.alternations, reassign,
        )  # fmt: skip
        shared = (member_FE.sum(1) == 0).nonzero().squeeze(1)
        return Partition(shared=shared, experts=index_sets(member_FE, plan.width))


def predicted_importance(sample: LayerActivations, ridge: float) -> tuple[Tensor, Tensor]:
    """Measure each neuron's saliency `mean v`, v = (w h ‖Wd‖)², and what a ridge regression on x knows of v.

    With `C = cov(x) + ridge mean(diag cov(x)) I = L L.T` a neuron's point is `L⁻¹ cov(x, v)`: the product of two points
    is that of their predictions `x C⁻¹ cov(x, v)`, summed over all tokens, as far as the ridge is small.

    Returns:
        Saliencies [F] and points [F, D].
    """
    hidden_size, width = sample.input_TD.shape[1], sample.ffn.intermediate_size
    device, dtype = sample.input_TD.device, squares_dtype(sample.input_TD.dtype)
    covariance_DD = torch.zeros(hidden_size, hidden_size, device=device)
    cross_XF = torch.zeros(hidden_size + 1, width, device=device)
    mean_D = sample.input_TD.mean(0, dtype=torch.float32)
    norm_F = sample.ffn.down_DF.float().norm(dim=0).to(dtype)
    for part, h_CF in sample.chunks():
        x_CD = sample.input_TD[part].float() - mean_D
        covariance_DD += x_CD.T @ x_CD
        x_CX = torch.cat([x_CD, torch.ones_like(x_CD[:, :1])], dim=1) * sample.weight_T[part, None].square()
        cross_XF += x_CX.to(dtype).T @ h_CF.to(dtype).mul_(norm_F).square_()  # h is nobody else's
    covariance_DD.diagonal().add_(ridge * covariance_DD.diagonal().mean())
    factor_DD = torch.linalg.cholesky(covariance_DD)
    points_DF = torch.linalg.solve_triangular(factor_DD, cross_XF[:-1], upper=False)
    return cross_XF[-1] / sample.tokens, points_DF.T


def cluster_neurons(
    score_F: Tensor, points_FX: Tensor, plan: Plan, iterations: int, generator: torch.Generator
) -> Partition:
    """Share the neurons of greatest score; group the others by balanced k-means on their unit vectors."""
    order_F = score_F.argsort(descending=True, stable=True)
    shared, routed = order_F.split([plan.shared_width, len(order_F) - plan.shared_width])
    shared = shared.sort().values
    if not plan.num_experts:
        return Partition(shared=shared, experts=routed[:0].view(0, 0))
    expert_R = balanced_kmeans(points_FX[routed], plan.num_experts, iterations, generator)
    return Partition(shared=shared, experts=groups(expert_R.to(routed.device), routed, plan.num_experts))


def balanced_kmeans(points_RX: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Cluster unit vectors into clusters of equal size, int64 [R] (spherical k-means, exact assignment)."""
    centers_EX = kmeans_plus_plus(points_RX, clusters, generator)
    expert_R = torch.full((len(points_RX),), -1)
    for _ in range(iterations):
        previous = expert_R
        expert_R = balanced_assignment(1 - points_RX @ centers_EX.T)
        if torch.equal(previous, expert_R):
            break
        sums_EX = torch.zeros_like(centers_EX).index_add_(0, expert_R.to(points_RX.device), points_RX)
        centers_EX = normalize(sums_EX, dim=1)
    return expert_R


def kmeans_plus_plus(points_RX: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw seeds one after another with probability proportional to the distance from those before."""
    chosen = [int(torch.randint(len(points_RX), (), generator=generator))]
    distance_R = 1 - points_RX @ points_RX[chosen[0]]
    while len(chosen) < clusters:
        chances_R = distance_R.clamp(min=1e-12).cpu()
        chosen.append(int(torch.multinomial(chances_R, 1, generator=generator)))
        distance_R = torch.minimum(distance_R, 1 - points_RX @ points_RX[chosen[-1]])
    return points_RX[chosen]
