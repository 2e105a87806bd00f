"""The mean gate row of an expert's neurons as its router: ExpertWeaver's (arXiv 2602.15521, §3)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import Gate, Router
from .linear import LinearGate


@dataclass(frozen=True, kw_only=True)
class GateCentroid(Router):
    """`x · mean of the expert's rows of Wg`."""

    gate_class: ClassVar[type[Gate]] = LinearGate

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        return {"weight": sample.ffn.gate_FD.float()[partition.experts].mean(1)}
