"""One partition over all layers: a token finds its neurons behind the same expert number in each of them.

Shapes: T tokens, F neurons, E routed experts, K experts of a token, P random directions of one layer, X of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ..calibration.activations import LayerActivations
from ..plan import Plan
from ._alternation import index_sets
from ._assignment import balanced_assignment
from .base import Partition, Partitioner, WholeModel
from .domains import class_means
from .specialists import spherical_kmeans


@dataclass(frozen=True, kw_only=True)
class Paths(Partitioner, WholeModel):
    """Tokens get experts first, for the whole model; in each layer neurons go where the tokens are that need them.

    Tokens are clustered by k-means on random projections of `|h| ‖Wd‖` in all layers; with K experts a token has the K
    nearest clusters'. In a layer a neuron would catch `sum over the tokens of expert e of w² (h ‖Wd‖)²` in e, in the
    shared expert that of all tokens, and a balanced assignment of the greatest sum decides. From there tokens go where
    the router that was fitted to these experts sends them, and neurons follow.
    """

    default_router: ClassVar[str] = "pregate"

    by_domain: bool = False
    """Whether clusters are the domains of the calibration text (one file each), not those of k-means."""
    directions: Annotated[int, Field(gt=0)] = 1_024
    """Random ones that tokens are clustered by, in all layers together."""
    iterations: Annotated[int, Field(gt=0)] = 20
    """Rounds of k-means."""
    alternations: Annotated[int, Field(ge=0)] = 1
    """Rounds in which tokens go where a router ahead of the model sends them, and neurons follow."""

    def repeats(self) -> int:
        return self.alternations

    def profile(self, sample: LayerActivations, layers: int, generator: torch.Generator) -> Tensor:
        return projected(sample, max(4, self.directions // layers), generator)

    def send(self, profile_TX: Tensor, domain_T: Tensor, plan: Plan, generator: torch.Generator) -> Tensor:
        unit_TX = normalize(profile_TX - profile_TX.mean(0), dim=1)
        if self.by_domain:
            centers_EX = class_means(unit_TX, domain_T % plan.num_experts, plan.num_experts)
        else:
            centers_EX = spherical_kmeans(unit_TX, plan.num_experts, self.iterations, generator)
        return (unit_TX @ centers_EX.T).topk(plan.num_experts_per_tok, dim=1).indices

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        if not plan.num_experts:
            order_F = sample.moments().saliency_F.argsort(descending=True, stable=True)
            return Partition(shared=order_F[: plan.shared_width].sort().values, experts=order_F[:0].view(0, 0))
        chosen_TK = sample.chosen_TK
        if chosen_TK is None:  # a layer alone is a whole model of one
            chosen_TK = self.send(self.profile(sample, 1, generator), sample.domain_T, plan, generator)
        captured_FX = captured(sample, chosen_TK, plan.num_experts)
        size_E = [plan.width] * plan.num_experts + [plan.shared_width] * bool(plan.shared)
        expert_F = balanced_assignment(-captured_FX[:, : len(size_E)], size_E).to(captured_FX.device)
        member_FE = one_hot(expert_F, plan.num_experts + 1)[:, :-1].float()
        shared = (expert_F == plan.num_experts).nonzero().squeeze(1)
        return Partition(shared=shared, experts=index_sets(member_FE, plan.width))


def projected(sample: LayerActivations, directions: int, generator: torch.Generator) -> Tensor:
    """Project `|h| ‖Wd‖`, of unit length in each token, on random signs, float32 [T, P]."""
    signs_FP = torch.randint(0, 2, (sample.ffn.intermediate_size, directions), generator=generator)
    signs_FP = (2.0 * signs_FP - 1).to(sample.input_TD.device) / directions**0.5
    norm_F = sample.ffn.down_DF.float().norm(dim=0)
    return torch.cat([normalize(h_CF.float().abs() * norm_F, dim=1) @ signs_FP for _, h_CF in sample.chunks()])


def captured(sample: LayerActivations, chosen_TK: Tensor, experts: int) -> Tensor:
    """Sum what each neuron would catch in each expert and in the shared one, per token, float32 [F, E + 1]."""
    found_FX = torch.zeros(sample.ffn.intermediate_size, experts + 1, device=sample.input_TD.device)
    for part, h_CF in sample.chunks():
        value_CF = (h_CF.float() * sample.weight_T[part, None]).square()
        sent_CX = torch.zeros(len(value_CF), experts + 1, device=value_CF.device)
        sent_CX.scatter_(1, chosen_TK[part].to(sent_CX.device), 1.0)  # an index of E is no expert
        sent_CX[:, -1] = 1.0
        found_FX += value_CF.T @ sent_CX
    return found_FX * (sample.ffn.down_DF.float().square().sum(0) / sample.tokens)[:, None]
