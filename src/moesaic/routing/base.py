"""The contract of a routing method: it fits a gate's parameters to a layer's calibration tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..calibration.sample import LayerSample
from ..partition import Partition


@dataclass(frozen=True, kw_only=True)
class RouterBuilder(ABC):
    """A method that builds the router of one layer; hyper-parameters are its fields."""

    gate: ClassVar[str] = "linear"
    """The kind of gate that runs it (`models.gates.GATES`)."""

    token_clusters: ClassVar[bool] = False
    """Whether it needs a partition made from clusters of tokens."""

    @abstractmethod
    def build(self, sample: LayerSample, partition: Partition, active: int) -> dict[str, Tensor]:
        """The parameters by name of a gate that lets `active` experts run."""
