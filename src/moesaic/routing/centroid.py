"""The nearest centroid: the router that belongs to token clusters (specialists)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import Gate, Router
from .linear import LinearGate


@dataclass(frozen=True, kw_only=True)
class Centroid(Router):
    """`argmax_e x · c_e`, the cluster of greatest cosine."""

    gate_class: ClassVar[type[Gate]] = LinearGate
    token_clusters: ClassVar[bool] = True

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        assert partition.centroids_ED is not None
        return {"weight": partition.centroids_ED}
