"""A number of experts for each layer: LExI (arXiv 2509.02753), by the error that fewer experts make on real tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Counting, LayerSample, Parameters, Ranking, SelectionSizes


@dataclass(frozen=True, kw_only=True)
class LayerK(Counting):
    """`count = the layer's own`, the counts of least summed error: `min sum_l error_l(k_l)` with `sum_l k_l` given.

    The error is the relative squared distance of the experts' output from that of the default number; LExI takes random
    inputs and searches by evolution; here they are calibration tokens, and the search is exact (dynamic programming).
    """

    needs_errors: ClassVar[bool] = True
    only_fewer: ClassVar[bool] = True

    def parameters(self, config: SelectionSizes) -> Mapping[str, Tensor]:
        return {"count": torch.tensor(float(config.num_experts_per_tok))}

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        rank_N = torch.arange(ranking.index_TN.shape[1], device=hidden_TD.device)
        return (parameters["count"].float() - rank_N).expand(ranking.index_TN.shape)

    def count(self, evidence_TN: Tensor) -> Tensor:
        return (evidence_TN > 0).sum(-1)

    def fit(self, layers: Sequence[LayerSample], mean: float) -> tuple[Self, list[Parameters]]:
        errors = [s.errors_K for s in layers]
        assert all(error is not None for error in errors), "errors_K was not measured"
        total = round(mean * len(layers))
        most = self.at_most or None
        counts = least_error([error[:most] for error in errors if error is not None], total, max(1, self.at_least))
        return self, [{"count": torch.tensor(float(count))} for count in counts]


def least_error(errors: Sequence[Tensor], total: int, least: int = 1) -> list[int]:
    """Choose a count for each layer, `total` in all, of least summed error; exact, by dynamic programming.

    Args:
        errors: of each layer, the error of 1, 2, ... experts.
        total: the sum of all counts.
        least: of a layer's count.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for error_K in errors:
        reached: dict[int, tuple[float, list[int]]] = {}
        for used, (cost, counts) in best.items():
            for count in range(least, len(error_K) + 1):
                now = cost + float(error_K[count - 1])
                if used + count <= total and now < reached.get(used + count, (float("inf"), []))[0]:
                    reached[used + count] = (now, [*counts, count])
        best = reached
    nearest = min(best, key=lambda used: abs(used - total))
    return best[nearest][1]
