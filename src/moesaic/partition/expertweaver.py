"""Neurons whose *gates* open together share an expert: after ExpertWeaver (arXiv 2602.15521, §3).

Shapes: T tokens, F neurons.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear, normalize

from ..calibration.activations import LayerActivations
from ..plan import Plan
from .base import Partition, Partitioner
from .coactivation import cluster_neurons


@dataclass(frozen=True, kw_only=True)
class ExpertWeaver(Partitioner):
    """Shared are the neurons whose gates are open most; the others are clustered by their gates' co-activation.

    The paper gives each layer its own share of shared neurons, which it finds better (App. B), and averages signed
    gates over a text before clustering; here the plan's share is used in all layers, and a profile has single tokens.
    """

    default_router: ClassVar[str] = "gate-centroid"

    profile_tokens: Annotated[int, Field(gt=0)] = 2_048
    """Tokens in a profile."""
    iterations: Annotated[int, Field(gt=0)] = 8
    """Rounds of balanced k-means."""

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        gate_TF = gate_activations(sample.subsample(self.profile_tokens, generator))
        profiles_FT = normalize(gate_TF - gate_TF.mean(0), dim=0).T
        return cluster_neurons(gate_TF.mean(0), profiles_FT, plan, self.iterations, generator)


def gate_activations(sample: LayerActivations) -> Tensor:
    """Compute `|act(x gate.T)|`, float32 [T, F]."""
    return sample.ffn.act_fn(linear(sample.input_TD, sample.ffn.gate_FD)).float().abs()
