"""Products with weights in half precision, on CPUs without units for it too.

There a product of many rows in bfloat16 takes six times as long as in float32, though one of few rows is bound by the
bytes of the weights and faster.

Shapes: T rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .devices import compute_dtype

FEW_ROWS = 4
"""So many cost less in half precision than widening the weights."""
CHUNK = 512
"""Outputs whose weights are in float32 at once: about what caches hold."""


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Compute `x W^T + b`, [..., O], equal to `linear` up to rounding, in what this machine is fast in."""
    if torch.compiler.is_compiling() or x_TI.numel() <= FEW_ROWS * x_TI.shape[-1] or not widens(x_TI):
        return linear(x_TI, weight_OI, bias_O)
    learns = torch.is_grad_enabled() and (x_TI.requires_grad or weight_OI.requires_grad)
    if learns or x_TI.dtype != weight_OI.dtype:
        return linear(x_TI, weight_OI, bias_O)
    wide_TI, out_TO = x_TI.float(), x_TI.new_empty(*x_TI.shape[:-1], len(weight_OI))
    for first, weight_CI in zip(range(0, len(weight_OI), CHUNK), weight_OI.split(CHUNK), strict=True):
        out_TO[..., first : first + CHUNK] = linear(wide_TI, weight_CI.float())
    return out_TO if bias_O is None else out_TO.add_(bias_O)


def widens(x: Tensor) -> bool:
    """Tell whether a tensor is in half precision, and the CPU that holds it multiplies float32 faster."""
    return x.dtype.itemsize == torch.half.itemsize and compute_dtype(x.dtype, x.device) != x.dtype


class Linear(nn.Linear):
    """A linear layer by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def quicken(model: nn.Module) -> None:
    """Let a model's linear layers multiply by `product`, where that is not `linear`; its weights stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear and widens(module.weight):
            module.__class__ = Linear
