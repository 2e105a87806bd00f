"""The bound of routing by neurons: every token its own best ones, all of them computed to find out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..bounds import top_neurons
from ..rows import Measurement, Point
from .base import Baseline, Cost, Evaluate, Measured, Request


@dataclass(frozen=True, kw_only=True)
class Neurons(Baseline):
    """What no router can do: the neurons of largest `|h_i| ‖Wd_i‖`, known before they are computed. It has no speed."""

    @property
    def calibrated(self) -> bool:
        return False

    def check(self, model: str, point: Point, measurement: Measurement) -> None:
        """Nothing can fail but loading the model, which the dense one's row does first."""

    def measure(self, request: Request, evaluate: Evaluate) -> Measured:
        active = request.point.active
        found = evaluate(request.model, partial(top_neurons, active=active))
        return Measured(found, Cost(ffn_active=active))
