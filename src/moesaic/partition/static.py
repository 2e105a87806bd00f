"""Static pruning by fluctuation with bias compensation: FLAP (arXiv 2312.11983), the baseline of equal cost.

All layers keep as many neurons as the plan says; FLAP's own default ranks neurons of all layers together.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..calibration.activations import LayerActivations
from ..plan import Plan
from .base import Partition, Partitioner


@dataclass(frozen=True, kw_only=True)
class Static(Partitioner):
    """Keeps the neurons of largest `Var_t(h) ‖Wd‖²`; the dropped ones' mean output becomes a bias."""

    static: ClassVar[bool] = True

    weighted: bool = False
    """Keep those of largest saliency `mean (w h)² ‖Wd‖²` instead, as our own cuts do; not FLAP's."""

    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        mean_F, square_F, saliency_F = sample.moments()
        down_DF = sample.ffn.down_DF.float()
        fluctuation_F = (square_F - mean_F.square()) * down_DF.square().sum(0)
        order_F = (saliency_F if self.weighted else fluctuation_F).argsort(descending=True, stable=True)
        kept, dropped = order_F.split([plan.shared_width, len(order_F) - plan.shared_width])
        bias_D = down_DF[:, dropped] @ mean_F[dropped]
        return Partition(shared=kept.sort().values, experts=torch.empty(0, 0, dtype=torch.int64), bias_D=bias_D)
