"""No recovery: the split's own weights, as the published training-free methods leave them."""

from dataclasses import dataclass

from ..calibration.activations import LayerActivations
from ..moe.block import MoE
from ..partition import Partition
from .base import Recovery


@dataclass(frozen=True, kw_only=True)
class NoRecovery(Recovery):
    """Leaves the block as it is."""

    def recover(self, moe: MoE, sample: LayerActivations, partition: Partition) -> None:
        return
