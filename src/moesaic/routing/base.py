"""The contract of a routing method: it fits a gate's parameters to a layer's calibration tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from ..calibration.activations import LayerActivations
from ..partition import Partition


@dataclass(frozen=True, kw_only=True)
class RouterBuilder(ABC):
    """A method that builds the router of one layer; hyper-parameters are its fields."""

    gate: ClassVar[str] = "linear"
    """The kind of gate that runs it (`models.gates.GATES`)."""

    token_clusters: ClassVar[bool] = False
    """Whether it needs a partition made from clusters of tokens."""

    @property
    def has_bias(self) -> bool:
        """Whether the gate adds a constant to each expert's score, which few architectures can say."""
        return False

    @abstractmethod
    def build(self, sample: LayerActivations, partition: Partition, active: int) -> dict[str, Tensor]:
        """The parameters by name of a gate that lets `active` experts run."""


def unit_scores(gate: dict[str, Tensor], x_TD: Tensor) -> dict[str, Tensor]:
    """A linear gate of the same choices with scores `x W.T + b` of mean 0 over the experts and root mean square near 1.

    So an export knows how far to scale them down; the factor is a power of two.
    """
    weight_ED = gate["weight"].float()
    bias_E = gate.get("e_score_correction_bias", weight_ED.new_zeros(len(weight_ED))).float()
    weight_ED, bias_E = weight_ED - weight_ED.mean(0), bias_E - bias_E.mean()
    scale = linear(x_TD.float(), weight_ED, bias_E).square().mean().sqrt()
    factor = 2.0 ** -scale.log2().round().item() if scale > 0 else 1.0
    return {"weight": weight_ED * factor, "e_score_correction_bias": bias_E * factor}
