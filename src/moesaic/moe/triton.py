"""Experts implementation `moesaic_triton` for a few tokens on a GPU: only the chosen experts' weights are read.

Two kernels: `h = act(x gate) * (x up)` of each pair of token and slot, then the down-projections of a token's slots,
weighted and summed in float32 in the order of the slots. Shapes are static and nothing waits for the device, so CUDA
graphs can hold it; indices from E on cost nothing. Every pair reads its expert's weights, so it is for few tokens: with
many, `grouped_mm` reads them once for all. Its naive twin is `moe.experts.Experts.forward`.

Shapes: T tokens, D hidden size, E experts, I neurons of one, K active experts, P = T K pairs.
"""

# without postponed annotations, which Triton's interpreter does not read

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..machine import triton_is_interpreted

ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1}
"""Activation modules of transformers and torch by the kernel's number for them."""
CONFIGS = [
    triton.Config({"ROWS": rows, "STEP": step}, num_warps=warps)
    for rows, step, warps in ((8, 256, 4), (16, 256, 4), (16, 512, 8), (32, 256, 8), (64, 128, 8))
]
if triton_is_interpreted():  # without a GPU there is nothing to tune by
    CONFIGS = CONFIGS[:1]


@triton.autotune(CONFIGS, key=["D", "I"])
@triton.jit
def _hidden(
    x_ptr, gate_up_ptr, index_ptr, h_ptr,
    K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, I: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute h[p, i] = act(x_t . gate_i) * (x_t . up_i) for a block of neurons i of one pair p; 0 for no expert."""
    pair = tl.program_id(0)
    expert = tl.load(index_ptr + pair)
    if expert < E:
        i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        gate_rows = gate_up_ptr + expert * 2 * I * D + i[:, None] * D
        gate = tl.zeros([ROWS], tl.float32)
        up = tl.zeros([ROWS], tl.float32)
        for start in range(0, D, STEP):
            d = start + tl.arange(0, STEP)
            inside = (i[:, None] < I) & (d[None, :] < D)
            x = tl.load(x_ptr + (pair // K) * D + d, d < D, 0.0).to(tl.float32)
            gate += tl.sum(tl.load(gate_rows + d[None, :], inside, 0.0).to(tl.float32) * x[None, :], 1)
            up += tl.sum(tl.load(gate_rows + I * D + d[None, :], inside, 0.0).to(tl.float32) * x[None, :], 1)
        if ACT == 0:
            activated = gate * tl.sigmoid(gate)
        else:  # tanh(z) = 2 sigmoid(2 z) - 1
            activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        tl.store(h_ptr + pair * I + i, (activated * up).to(h_ptr.dtype.element_ty), i < I)


@triton.autotune(CONFIGS, key=["D", "I"])
@triton.jit
def _down(
    h_ptr, down_ptr, index_ptr, weight_ptr, y_ptr,
    K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, I: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute y[t, d] = sum_k weight_tk (h_tk . down_d) for a block of outputs d of one token t."""
    token = tl.program_id(0)
    d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    y = tl.zeros([ROWS], tl.float32)
    for slot in range(K):
        pair = token * K + slot
        expert = tl.load(index_ptr + pair)
        if expert < E:
            total = tl.zeros([ROWS], tl.float32)
            for start in range(0, I, STEP):
                i = start + tl.arange(0, STEP)
                h = tl.load(h_ptr + pair * I + i, i < I, 0.0).to(tl.float32)
                rows = down_ptr + expert * D * I + d[:, None] * I + i[None, :]
                inside = (d[:, None] < D) & (i[None, :] < I)
                total += tl.sum(tl.load(rows, inside, 0.0).to(tl.float32) * h[None, :], 1)
            y += total * tl.load(weight_ptr + pair).to(tl.float32)
    tl.store(y_ptr + token * D + d, y.to(y_ptr.dtype.element_ty), d < D)


def supports(self: Any) -> bool:
    """Tell whether the kernels know the experts' activation and their weights lie as the kernels expect."""
    weights = (self.gate_up_proj, self.down_proj)
    return type(self.act_fn).__name__ in ACTIVATIONS and all(weight.is_contiguous() for weight in weights)


def triton_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute `y_t = sum_k weight_tk * expert_{index_tk}(x_t)`, [T, D]; for inference."""
    (tokens, hidden), (_, slots) = hidden_states.shape, top_k_index.shape
    experts, _, width = self.down_proj.shape
    x_TD, index_TK = hidden_states.contiguous(), top_k_index.contiguous()
    h_PI = x_TD.new_empty(tokens * slots, width)
    y_TD = torch.empty_like(x_TD)
    sizes = {"K": slots, "E": experts, "D": hidden, "I": width}

    def hidden_grid(meta: dict[str, int]) -> tuple[int, int]:
        return tokens * slots, triton.cdiv(width, meta["ROWS"])

    def down_grid(meta: dict[str, int]) -> tuple[int, int]:
        return tokens, triton.cdiv(hidden, meta["ROWS"])

    act = ACTIVATIONS[type(self.act_fn).__name__]
    with torch.cuda.device_of(x_TD):  # kernels run on the current GPU, which need not be the tokens'
        _hidden[hidden_grid](x_TD, self.gate_up_proj, index_TK, h_PI, **sizes, ACT=act)
        _down[down_grid](h_PI, self.down_proj, index_TK, top_k_weights.contiguous(), y_TD, **sizes)
    return y_TD
