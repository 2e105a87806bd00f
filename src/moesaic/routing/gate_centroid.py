"""The mean gate row of an expert's neurons as its router: ExpertWeaver's (arXiv 2602.15521, §3)."""

from dataclasses import dataclass

from torch import Tensor

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import RouterBuilder


@dataclass(frozen=True, kw_only=True)
class GateCentroid(RouterBuilder):
    """`x · mean of the expert's rows of Wg`."""

    def build(self, sample: LayerActivations, partition: Partition, active: int) -> dict[str, Tensor]:
        return {"weight": sample.ffn.gate_FD.float()[partition.experts].mean(1)}
