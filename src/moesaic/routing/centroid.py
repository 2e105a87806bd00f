"""The nearest centroid: the router that belongs to token clusters (specialists)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import RouterBuilder


@dataclass(frozen=True, kw_only=True)
class Centroid(RouterBuilder):
    """`argmax_e x · c_e`, the cluster of greatest cosine."""

    token_clusters: ClassVar[bool] = True

    def build(self, sample: LayerActivations, partition: Partition, active: int) -> dict[str, Tensor]:
        assert partition.centroids_ED is not None
        return {"weight": partition.centroids_ED}
