"""Ridge regression on a layer's input, summed over chunks of tokens.

Shapes: T tokens, C tokens of one chunk, D hidden size, E targets.
"""

import torch
from torch import Tensor

from .sample import CHUNK_TOKENS


def weighted_ridge(
    x_TD: Tensor, target_TE: Tensor, weight_T: Tensor, ridge: float, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """(W [D, E], b [E]) of the least squares weighted by `weight_T²`; the intercept b is not penalised, or 0.

    Summed over chunks of tokens, in float32 each and float64 together.
    """
    chunks = list(zip(*(v.split(CHUNK_TOKENS) for v in (x_TD, target_TE, weight_T)), strict=True))
    share = intercept / weight_T.double().square().sum()
    mean_x = torch.stack([w_C.double().square() * share @ x_CD.double() for x_CD, _, w_C in chunks]).sum(0)
    mean_y = torch.stack([w_C.double().square() * share @ y_CE.double() for _, y_CE, w_C in chunks]).sum(0)
    gram_DD, right_DE = (torch.zeros(len(mean_x), len(m), device=m.device, dtype=m.dtype) for m in (mean_x, mean_y))
    for x_CD, y_CE, w_C in chunks:
        scaled_CD = (x_CD - mean_x).float() * w_C[:, None]
        gram_DD += scaled_CD.T @ scaled_CD
        right_DE += scaled_CD.T @ ((y_CE - mean_y).float() * w_C[:, None])
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean())
    weight_DE = torch.linalg.solve(gram_DD, right_DE)
    return weight_DE.float(), (mean_y - mean_x @ weight_DE).float()
