"""No recovery: the split's own weights, as the published training-free methods leave them."""

from dataclasses import dataclass

from ..calibration.sample import LayerSample
from ..models.moe import MoE
from ..partition import Partition
from .base import Recovery


@dataclass(frozen=True, kw_only=True)
class Nothing(Recovery):
    """Leaves the block as it is."""

    def recover(self, moe: MoE, sample: LayerSample, partition: Partition) -> None:
        return
