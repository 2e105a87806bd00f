"""An expert for each domain of text: Read-ME's experts (arXiv 2410.19123, §3).

Shapes: T tokens, D hidden size, F neurons, E experts, I neurons of one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..calibration.activations import LayerActivations
from ..errors import InputError
from ..plan import Plan
from .base import Partition, Partitioner
from .specialists import cluster_saliency


@dataclass(frozen=True, kw_only=True)
class Domains(Partitioner):
    """For each domain the neurons of greatest mean `|h|` on its text; what all domains have in common is shared.

    With a router of each layer a token goes to the domain of the nearest mean input; Read-ME has one router for all
    (`--router pregate`). More domains than experts share them in turn. Shared are the neurons that the most domains
    want, as many as the plan says: as long as that is no more than what all want, shared and own neurons of a domain
    are together its best ones, as in the paper. What several domains want beyond that is stored in each.
    """

    default_router: ClassVar[str] = "centroid"
    overlapping: ClassVar[bool] = True
    labelled: ClassVar[bool] = True
    token_clusters = True

    saliency: bool = False
    """Whether neurons count by `sum (w h)² ‖Wd‖²`, not by the paper's mean `|h|`."""
    copied: bool = False
    """Whether each expert stores what it shares with others: nothing is shared, experts are as wide as `--active` says,
    and `--memory-factor` how many there are (with 0.5 and 3.5: the paper's seven)."""

    def shape(self, active: float, memory_factor: float, intermediate_size: int) -> Plan | None:
        if not self.copied:
            return None
        width = max(1, round(active * intermediate_size))
        experts = int(memory_factor * intermediate_size / width + 1e-6)
        if experts < 2:
            raise InputError(
                f"partition 'domains:copied=True' holds {experts} expert of {active:.0%} of the FFN in --memory-factor "
                f"{memory_factor:g}; give --memory-factor {2 * active:g} or more, {active:g} for each domain"
            )
        return Plan(0, 1, experts, width)

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        expert_T = sample.domain_T % plan.num_experts
        score_EF = (cluster_saliency if self.saliency else mean_magnitude)(sample, expert_T, plan.num_experts)
        shared = common(score_EF, plan.shared_width, plan.width + plan.shared_width)
        score_EF[:, shared] = -torch.inf
        experts_EI = score_EF.topk(plan.width, dim=1).indices.sort(dim=1).values
        return Partition(
            shared=shared, experts=experts_EI, centroids_ED=class_means(sample.input_TD, expert_T, plan.num_experts)
        )


def mean_magnitude(sample: LayerActivations, class_T: Tensor, classes: int) -> Tensor:
    """Compute the mean `|h|` of each neuron in each class of tokens, float32 [classes, F]."""
    sums_EF = torch.zeros(classes, sample.ffn.intermediate_size, device=sample.input_TD.device)
    for part, h_CF in sample.chunks():
        sums_EF.index_add_(0, class_T[part], h_CF.float().abs())
    return sums_EF / torch.bincount(class_T, minlength=classes).clamp(min=1)[:, None]


def common(score_EF: Tensor, count: int, wanted: int) -> Tensor:
    """Choose the `count` neurons that are among the `wanted` best of the most classes, int64, ascending.

    Among those of as many classes the ones of greatest sum, each class's scores relative to their mean.
    """
    best_EI = score_EF.topk(min(wanted, score_EF.shape[1]), dim=1).indices
    votes_F = torch.bincount(best_EI.flatten(), minlength=score_EF.shape[1]).float()
    sum_F = (score_EF / score_EF.mean(1, keepdim=True).clamp(min=1e-30)).sum(0)
    return (votes_F + sum_F / (1 + sum_F.max())).topk(count).indices.sort().values


def class_means(x_TD: Tensor, class_T: Tensor, classes: int) -> Tensor:
    """Compute the unit mean of the unit vectors of each class, less the mean of all, float32 [classes, D]."""
    unit_TD = normalize(x_TD.float(), dim=1)
    sums_ED = torch.zeros(classes, x_TD.shape[1], device=x_TD.device).index_add_(0, class_T, unit_TD)
    means_ED = sums_ED / torch.bincount(class_T, minlength=classes).clamp(min=1)[:, None]
    return normalize(means_ED - unit_TD.mean(0), dim=1)
