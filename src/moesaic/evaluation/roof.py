"""What a machine does in one large product, which is above anything that a model reaches on it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.products import product
from ..results import Roof
from .clock import now


@torch.inference_mode()
def roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measure the `bytes_per_s` that a product with one token reads and the `flops_per_s` of one with many.

    The matrix is larger than caches.
    """
    one, other = (torch.zeros(8_192, 8_192, dtype=dtype, device=device) for _ in range(2))

    def best(x_TD: Tensor) -> float:
        times = []
        for _ in range(4):
            start = now(x_TD)
            product(x_TD, one)
            product(x_TD, other)
            times.append((now(x_TD) - start) / 2)
        return min(times)

    return Roof(
        bytes_per_s=one.numel() * dtype.itemsize / best(one[:1]), flops_per_s=2 * 512 * one.numel() / best(one[:512])
    )
