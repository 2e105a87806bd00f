"""One down-projection solved again, so that what an FFN says on given features meets a target.

Shapes: T tokens, C tokens of one chunk, D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.activations import CHUNK_TOKENS, LayerActivations
from .closed_form import HELD_OUT, Features, Systems, add, best_ridge, solve_arrows, weighted


@dataclass(frozen=True)
class FitSample:
    """What an FFN is fitted to."""

    input_TD: Tensor
    """What enters it."""
    target_TD: Tensor
    """What it should say."""
    weight_T: Tensor
    """What an error in each token is worth; the squared error counts as its square."""

    @classmethod
    def of(cls, sample: LayerActivations) -> FitSample:
        """Take a layer's calibration tokens, those that open a text first."""
        parts = [part for part in (sample.opening, sample) if part is not None]
        names = ("input_TD", "output_TD", "weight_T")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[FitSample]:
        """Cut the tokens from `first` to `last` into chunks."""
        for start in range(first, len(self.input_TD) if last is None else last, CHUNK_TOKENS):
            part = slice(start, min(start + CHUNK_TOKENS, last or len(self.input_TD)))
            yield FitSample(self.input_TD[part], self.target_TD[part], self.weight_T[part])


Hidden = Callable[[Tensor], Tensor]
"""The features [C, F] of inputs [C, D]: the neurons' activations, perhaps with some of them 0."""


@torch.no_grad()
def refit(hidden: Hidden, down_DF: Tensor, rows: FitSample, ridge: float | None = None) -> Tensor:
    """Solve `min_W sum_t w_t² ‖y_t - W h_t‖² + ridge sum_i G_ii ‖W_i - W_own,i‖²`: float32 [D, F].

    G_ii is the feature's own weighted energy, as in `ClosedForm`. The penalty is 0 at W_own, so on the rows that it is
    solved for the error never grows.

    Args:
        hidden: the features h.
        down_DF: W_own.
        rows: inputs, targets y and weights w.
        ridge: None is that of `RIDGES` with the least error on the last of `HELD_OUT` tokens.
    """
    tokens = len(rows.input_TD)
    fitted = tokens - (tokens // HELD_OUT if ridge is None else 0)
    systems: Systems = {}
    for number, z_CF, rest_CD in _features(hidden, down_DF, rows.chunks(0, fitted)):
        add(systems, number, z_CF, rest_CD)
    if ridge is None:
        ridge = best_ridge(systems, 0, _features(hidden, down_DF, rows.chunks(fitted)))
    return down_DF.float() + torch.cat(solve_arrows(systems, 0, ridge)).T


def _features(hidden: Hidden, down_DF: Tensor, chunks: Iterator[FitSample]) -> Features:
    """Compute chunks (0, weighted features, what W_own leaves of the target)."""
    for rows in chunks:
        h_CF = hidden(rows.input_TD)
        rest_CD = rows.target_TD.float() - linear(h_CF, down_DF).float()
        yield 0, *weighted(h_CF, rest_CD, rows.weight_T)


def weighted_error(rows: FitSample, output_TD: Tensor) -> float:
    """Compute `sum_t w_t² ‖y_t - output_t‖²`, which `refit` lessens."""
    rest_TD = (rows.target_TD.float() - output_TD.float()) * rows.weight_T[:, None]
    return rest_TD.square().sum().item()
