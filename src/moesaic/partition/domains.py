"""An expert for each domain of text: the training-free part of Read-ME (arXiv 2410.19123, §3).

Shapes: T tokens, D hidden size, F neurons, E experts, N domains.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..calibration.activations import LayerActivations
from ..plan import Plan
from .base import Partition, Partitioner
from .specialists import cluster_saliency


@dataclass(frozen=True, kw_only=True)
class Domains(Partitioner):
    """An expert has the neurons that matter most to its domain; a token goes where its layer's input points.

    Read-ME then trains experts and one router ahead of the model; without training the domain is told by the nearest
    mean input, layer by layer. More domains than experts share them in turn.
    """

    default_router: ClassVar[str] = "centroid"
    overlapping: ClassVar[bool] = True
    labelled: ClassVar[bool] = True
    token_clusters = True

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        expert_T = sample.domain_T % plan.num_experts
        saliency_EF = cluster_saliency(sample, expert_T, plan.num_experts)
        shared = saliency_EF.sum(0).topk(plan.shared_width).indices.sort().values
        saliency_EF[:, shared] = -torch.inf
        experts_EI = saliency_EF.topk(plan.width, dim=1).indices.sort(dim=1).values
        return Partition(
            shared=shared, experts=experts_EI, centroids_ED=class_means(sample.input_TD, expert_T, plan.num_experts)
        )


def class_means(x_TD: Tensor, class_T: Tensor, classes: int) -> Tensor:
    """Compute the unit mean of the unit vectors of each class, less the mean of all, float32 [classes, D]."""
    unit_TD = normalize(x_TD.float(), dim=1)
    sums_ED = torch.zeros(classes, x_TD.shape[1], device=x_TD.device).index_add_(0, class_T, unit_TD)
    means_ED = sums_ED / torch.bincount(class_T, minlength=classes).clamp(min=1)[:, None]
    return normalize(means_ED - unit_TD.mean(0), dim=1)
