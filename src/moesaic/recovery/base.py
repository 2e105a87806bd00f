"""The contract of a recovery method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..calibration.activations import LayerActivations
from ..moe.block import MoE
from ..partition import Partition


@dataclass(frozen=True, kw_only=True)
class Recovery(ABC):
    """A method that improves one converted layer in place; hyper-parameters are its fields."""

    @abstractmethod
    def recover(self, moe: MoE, sample: LayerActivations, partition: Partition) -> None:
        """Change the block's weights so that its output on the sample is nearer to the dense FFN's."""
