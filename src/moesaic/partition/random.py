"""Neurons in random order: LLaMA-MoE's split (arXiv 2406.16554) and the file to copy for a method of your own."""

from dataclasses import dataclass

import torch

from ..calibration.activations import LayerActivations
from ..plan import Plan
from .base import Partition, Partitioner, disjoint


@dataclass(frozen=True, kw_only=True)
class Random(Partitioner):
    """A random permutation of the neurons, cut into groups."""

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        return disjoint(torch.randperm(sample.ffn.intermediate_size, generator=generator), plan)
