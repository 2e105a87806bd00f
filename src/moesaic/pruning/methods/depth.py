"""Depth: decoder layers that hardly change the residual stream go (ShortGPT, arXiv 2403.03853).

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from .base import LayerPruner


@dataclass(frozen=True, kw_only=True)
class Depth(LayerPruner):
    """The layers of least Block Influence, `BI_i = 1 - mean over tokens of cos(x_i, x_{i+1})`; x_i enters layer i.

    With `contiguous` the run of layers of least angular distance `arccos(cos(x_i, x_{i+n})) / π` (Gromov et al., arXiv
    2403.17887, equation 7, there of each text's last token, here of all).
    """

    contiguous: bool = False
    """Whether one run of layers goes, by the distance of Gromov et al."""

    def span(self, drop: int) -> int:
        return drop if self.contiguous else 1

    def distance(self, before_TD: Tensor, after_TD: Tensor) -> Tensor:
        cosine_T = cosine_similarity(before_TD.float(), after_TD.float(), dim=-1)
        return cosine_T.clamp(-1, 1).arccos() / math.pi if self.contiguous else 1 - cosine_T

    def choose(self, distances: Sequence[float], drop: int) -> list[int]:
        order = sorted(range(len(distances)), key=distances.__getitem__)
        if self.contiguous and drop:
            return list(range(order[0], order[0] + drop))
        return sorted(order[:drop])
