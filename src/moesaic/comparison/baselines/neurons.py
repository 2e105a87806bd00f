"""The bound of routing by neurons: every token its own best ones, all of them computed to find out.

After TEAL (arXiv 2408.14690) and WINA (arXiv 2505.19427). Shapes: T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...calibration.activations import LayerActivations
from ...models.families import GatedFFN
from ..rows import Measurement, Point
from .base import Cost, Evaluate, Measured, Request
from .sparse import SparseFFN, Sparsity, Tensors, largest, sparse, unlearnt


class NeuronsFFN(SparseFFN):
    """`down(h where |h_i| ‖Wd_i‖ is among the largest of its token)`, with the dense weights."""

    def __init__(self, ffn: GatedFFN, tensors: Tensors, density: float) -> None:
        super().__init__(ffn, tensors, density)
        self.norm_F = ffn.down_DF.float().norm(dim=0)

    def hidden(self, x_TD: Tensor) -> Tensor:
        h_TF = self.ffn.hidden(x_TD)
        return h_TF.where(largest(h_TF.float().abs() * self.norm_F, self.density), 0)


@dataclass(frozen=True, kw_only=True)
class Neurons(Sparsity):
    """What no router can do: the neurons of largest `|h_i| ‖Wd_i‖`, known before they are computed. It has no speed."""

    ffn_class: ClassVar[type[SparseFFN]] = NeuronsFFN

    @property
    def calibrated(self) -> bool:
        return False

    def fit(self, sample: LayerActivations, density: float) -> Tensors:
        return {}

    def check(self, model: str, point: Point, measurement: Measurement) -> None:
        """Nothing can fail but loading the model, which the dense one's row does first."""

    def measure(self, request: Request, evaluate: Evaluate) -> Measured:
        active = request.point.active
        found = evaluate(request.model, lambda model: sparse(model, self, active, unlearnt()))
        return Measured(found, Cost(ffn_active=active))
