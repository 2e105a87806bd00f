"""One decoder layer's calibration: what enters and leaves its FFN, and the error of what replaces it.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.families import ffn_name, gated_ffn
from ..models.layerwise import LayerwiseModel
from ..moe.block import MoE
from .activations import CHUNK_TOKENS, LayerActivations

SINK = 4
"""Times the median norm, from which a token is an attention sink."""
MIN_NORM = 0.05
"""Least norm of an FFN output that is told apart from less, relative to the median."""


@contextmanager
def replaced_ffn(layer: nn.Module, replacement: nn.Module) -> Iterator[None]:
    """Run a decoder layer with another FFN; the dense one is put back on leaving."""
    name = ffn_name(layer)
    dense = layer.get_submodule(name)
    setattr(layer, name, replacement)
    try:
        yield
    finally:
        setattr(layer, name, dense)


class Tap(nn.Module):
    """The dense FFN, keeping what enters and leaves it."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        output = self.ffn(hidden_states)
        self.inputs.append(hidden_states.flatten(0, -2))
        self.outputs.append(output.flatten(0, -2))
        return output


class AttentionTape:
    """Outputs of a layer's attention, recorded in one pass and played in the next in place of computing them again.

    Both passes give the layer the same batches. What mixes tokens under another name than `self_attn` just runs twice.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.modules = [child for name, child in layer.named_children() if name == "self_attn"]
        self.outputs: deque[Tensor] = deque()

    @contextmanager
    def recording(self) -> Iterator[None]:
        hooks = [m.register_forward_hook(lambda _m, _i, output: self.outputs.append(output[0])) for m in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def playing(self) -> Iterator[None]:
        for module in self.modules:
            module.forward = lambda *_, **__: (self.outputs.popleft(), None)
        try:
            yield
        finally:
            for module in self.modules:
                del module.forward


def calibrate(
    stream: LayerwiseModel,
    index: int,
    layer: nn.Module,
    hidden_NLD: Tensor,
    domain_N: Tensor,
    first: tuple[Tensor, Tensor] | None = None,
) -> LayerActivations:
    """Run the dense layer on the calibration tokens and keep what concerns its FFN.

    `first` has the FFN inputs and the targets, [M, D] each, of tokens that open a text; their weights follow the same
    rule on the same scale.
    """
    input_TD, output_TD, _ = tapped(stream, index, layer, hidden_NLD)
    norm_T = output_TD.float().norm(dim=1)
    least = max(MIN_NORM * norm_T.median().item(), 1e-30)
    weight_T = norm_T.clamp(min=least).reciprocal()
    mean = weight_T.mean()
    sample = LayerActivations(
        ffn=gated_ffn(layer.get_submodule(ffn_name(layer))),
        input_TD=input_TD,
        output_TD=output_TD,
        weight_T=weight_T / mean,
        domain_T=domain_N.to(input_TD.device).repeat_interleave(hidden_NLD.shape[1]),
    )
    if first is None:
        return sample
    input_MD, target_MD = first
    weight_M = target_MD.float().norm(dim=1).clamp(min=least).reciprocal() / mean
    domain_M = torch.zeros(len(input_MD), dtype=torch.int64, device=input_MD.device)
    opening = LayerActivations(sample.ffn, input_MD, target_MD, weight_M, domain_M)
    return replace(sample, opening=opening)


def tapped(
    stream: LayerwiseModel, index: int, layer: nn.Module, hidden_NLD: Tensor, ffn: nn.Module | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(what enters the layer's FFN, or `ffn` in its place, [T, D], what leaves it [T, D] and the layer [N, L, D])."""
    tap = Tap(ffn or layer.get_submodule(ffn_name(layer)))
    with replaced_ffn(layer, tap):
        after_NLD = stream.run(index, layer, hidden_NLD)
    return torch.cat(tap.inputs), torch.cat(tap.outputs), after_NLD


def relative_error(sample: LayerActivations, output_TD: Tensor) -> float:
    """`sqrt(sum w² ‖y - output‖² / sum w² ‖y‖²)` over the sample's tokens."""
    wrong = right = 0.0
    for first in range(0, sample.tokens, CHUNK_TOKENS):
        part = slice(first, first + CHUNK_TOKENS)
        y_CD, square_C = sample.output_TD[part].float(), sample.weight_T[part].square()
        wrong += ((output_TD[part].float() - y_CD).square().sum(1) * square_C).sum().item()
        right += (y_CD.square().sum(1) * square_C).sum().item()
    return (wrong / max(right, 1e-30)) ** 0.5


def residual_stream_error(dense_NLD: Tensor, converted_NLD: Tensor) -> dict[str, float | None]:
    """How far converted layers have taken the residual stream from the dense one's, over tokens t.

    `residual_error`: the mean of `‖c_t - d_t‖ / ‖d_t‖`. `sink_norm`: the mean of `‖c_t‖ / ‖d_t‖` over attention sinks,
    told by `‖d_t‖ > 4 median ‖d‖`; None where there are none.
    """
    dense_TD, converted_TD = dense_NLD.flatten(0, 1).float(), converted_NLD.flatten(0, 1).float()
    norm_T = dense_TD.norm(dim=1)
    sinks_T = norm_T > SINK * norm_T.median()
    error = ((converted_TD - dense_TD).norm(dim=1) / norm_T.clamp(min=1e-30)).mean().item()
    kept = (converted_TD.norm(dim=1) / norm_T)[sinks_T].mean().item() if sinks_T.any() else None
    return {"residual_error": error, "sink_norm": kept}


@torch.no_grad()
def expert_load(moe: MoE, sample: LayerActivations) -> Tensor:
    """How many of the sample's tokens run each routed expert, int64 [E]."""
    if moe.gate is None or moe.experts is None:
        return torch.zeros(0, dtype=torch.int64)
    index_TK = torch.cat([moe.gate(x_CD, moe.experts)[0] for x_CD in sample.input_TD.split(CHUNK_TOKENS)])
    return torch.bincount(index_TK.flatten().cpu(), minlength=moe.experts.num_experts)
