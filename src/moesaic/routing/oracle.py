"""The routing that linear routers are fitted to: the true output norms. Runs every expert; for analysis only."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import Gate, RoutedExperts, Router


class OracleGate(Gate):
    """`‖h_e Wd_e‖`, the true norm of each expert's output: runs every expert, so it is for analysis only."""

    trainable_names: ClassVar[tuple[str, ...]] = ()

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        return experts.output_norms(hidden_TD)


@dataclass(frozen=True, kw_only=True)
class Oracle(Router):
    """`‖h_e Wd_e‖`; the bound for routers by norm at equal active neurons."""

    gate_class: ClassVar[type[Gate]] = OracleGate
    runs_all_experts: ClassVar[bool] = True

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        return {}
