"""Ridge regression on a layer's input, summed over chunks of tokens.

Shapes: T tokens, C tokens of one chunk, D hidden size, E targets.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .activations import CHUNK_TOKENS


class WeightedRidge:
    """`min_{W,b} sum_t w_t² ‖x_t W + b - y_t‖² + λ ‖W‖²`, λ = ridge × the mean diagonal of the normal equations.

    They are summed and factored once, for any number of targets: float32 in each chunk, float64 together. The
    intercept b is not penalised, or 0.
    """

    def __init__(self, x_TD: Tensor, weight_T: Tensor, ridge: float, intercept: bool = True) -> None:
        self.x_TD, self.weight_T = x_TD, weight_T
        self.square_T = weight_T.double().square()
        self.share = intercept / self.square_T.sum()
        self.mean_D = self._mean(x_TD)
        gram_DD = self.mean_D.new_zeros(len(self.mean_D), len(self.mean_D))
        for _, scaled_CD in self._scaled():
            gram_DD += scaled_CD.T @ scaled_CD
        gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean())
        self.factor = torch.linalg.lu_factor(gram_DD)

    def fit(self, target_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Fit targets [T, E]: (W [D, E], b [E]) in float32."""
        mean_E = self._mean(target_TE)
        right_DE = mean_E.new_zeros(len(self.mean_D), len(mean_E))
        for part, scaled_CD in self._scaled():
            rest_CE = target_TE[part].float() - mean_E.float()
            right_DE += scaled_CD.T @ (rest_CE * self.weight_T[part, None])
        weight_DE = torch.linalg.lu_solve(*self.factor, right_DE)
        return weight_DE.float(), (mean_E - self.mean_D @ weight_DE).float()

    def _mean(self, value_TX: Tensor) -> Tensor:
        """Compute the weighted mean of each column in float64, or zeros without an intercept."""
        parts = zip(value_TX.split(CHUNK_TOKENS), self.square_T.split(CHUNK_TOKENS), strict=True)
        return torch.stack([square_C * self.share @ value_CX.double() for value_CX, square_C in parts]).sum(0)

    def _scaled(self) -> Iterator[tuple[slice, Tensor]]:
        """Compute (slice of tokens, w (x - mean)) of each chunk, float32."""
        for first in range(0, len(self.x_TD), CHUNK_TOKENS):
            part = slice(first, first + CHUNK_TOKENS)
            yield part, (self.x_TD[part].float() - self.mean_D.float()) * self.weight_T[part, None]
