"""The routing that linear routers are fitted to: the true output norms. Runs every expert; for analysis only."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import RouterBuilder


@dataclass(frozen=True, kw_only=True)
class Oracle(RouterBuilder):
    """`‖h_e Wd_e‖`; the bound for routers by norm at equal active neurons."""

    gate: ClassVar[str] = "oracle"

    def build(self, sample: LayerActivations, partition: Partition, active: int) -> dict[str, Tensor]:
        return {}
