"""Neurons in the order of the checkpoint: the column blocks of DSMoE (arXiv 2502.12455, §3)."""

from dataclasses import dataclass

import torch

from ..calibration.activations import LayerActivations
from ..plan import Plan
from .base import Partition, Partitioner, disjoint


@dataclass(frozen=True, kw_only=True)
class Contiguous(Partitioner):
    """Neurons 0, 1, 2, ... cut into groups."""

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        return disjoint(torch.arange(sample.ffn.intermediate_size), plan)
