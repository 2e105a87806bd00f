"""The nearest centroid: the router that belongs to token clusters (specialists)."""

from dataclasses import dataclass

from torch import Tensor

from ..calibration.sample import LayerSample
from ..errors import InputError
from ..partition import Partition
from .base import RouterBuilder


@dataclass(frozen=True, kw_only=True)
class Centroid(RouterBuilder):
    """`argmax_e x · c_e`, the cluster of greatest cosine."""

    def build(self, sample: LayerSample, partition: Partition) -> dict[str, Tensor]:
        if partition.centroids_ED is None:
            raise InputError("router 'centroid' needs a partition of tokens, such as 'specialists'; use 'linear'")
        return {"weight": partition.centroids_ED}
