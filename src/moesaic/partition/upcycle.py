"""Every expert a copy of the whole FFN, to be told apart by training: sparse upcycling (arXiv 2212.05055).

MoE-LLaVA (arXiv 2401.15947, stage III) starts so, with 4 experts of which 2 run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..calibration.activations import LayerActivations
from ..errors import InputError
from ..given import LIMITS, Limit
from ..plan import Plan
from .base import Partition, Partitioner

MOST = int(LIMITS["memory_factor"].most)


@dataclass(frozen=True, kw_only=True)
class Upcycle(Partitioner):
    """`experts` copies of the FFN, `active` of which run; a token's weights sum to 1, so the start is the dense model.

    It costs `active` times the dense FFN's work and `experts` times its memory: room to learn, not a saving.
    """

    default_router: ClassVar[str] = "softmax"
    default_recovery: ClassVar[str] = "none"
    overlapping: ClassVar[bool] = True
    whole_experts: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Limit]] = {"experts": Limit(2, MOST), "active": Limit(1, MOST)}

    experts: int = 4
    """Copies of the FFN."""
    active: int = 2
    """Experts that run for one token."""

    def shape(self, active: float, memory_factor: float, intermediate_size: int) -> Plan:
        """Make `experts` groups of the FFN's own width, whatever share and memory are.

        Raises:
            InputError: more experts would run than there are.
        """
        if self.active > self.experts:
            raise InputError(
                f"partition 'upcycle' has active={self.active} and experts={self.experts}; at most all can run: give "
                f"active={self.experts} or less, or experts={self.active} or more"
            )
        return Plan(0, self.active, self.experts, intermediate_size)

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        every_F = torch.arange(sample.ffn.intermediate_size)
        return Partition(shared=every_F[:0], experts=every_F.repeat(plan.num_experts, 1))
