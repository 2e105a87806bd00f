"""One decoder layer's calibration: what enters and leaves its FFN, and the error of what replaces it.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.families import attention, ffn_name, gated_ffn
from ..models.integrity import check_numbers
from ..models.layerwise import LayerwiseModel
from ..models.pictured import Pictured
from .activations import CHUNK_TOKENS, LayerActivations

SINK = 4
"""Times the median norm, from which a token is an attention sink."""
MIN_NORM = 0.05
"""Least norm of an FFN output that is told apart from less, relative to the median."""


@contextmanager
def replaced_ffn(layer: nn.Module, replacement: nn.Module) -> Iterator[None]:
    """Put another FFN into a decoder layer; the dense one is put back on leaving."""
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


class Tapped(NamedTuple):
    """What was seen of an FFN while its layer ran."""

    input_TD: Tensor
    output_TD: Tensor
    after_NLD: Tensor
    """What left the layer."""


class OpeningTargets(NamedTuple):
    """FFN inputs and targets of tokens that open a text, and what the dense layer makes of them."""

    input_MD: Tensor
    target_MD: Tensor
    dense_after_M1D: Tensor


class AttentionTape:
    """Outputs of a layer's attention, recorded in one pass and played in the next in place of computing them again.

    Both passes give the layer the same batches. What mixes tokens under a name that is not known just runs twice.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.modules = [module for module in (attention(layer),) if module is not None]
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
    opening: OpeningTargets | None = None,
    pictured: Pictured | None = None,
    image_weight: float = 1.0,
) -> LayerActivations:
    """Run the dense layer on the calibration tokens and keep what concerns its FFN.

    Args:
        stream: the dense model.
        index: the layer's number.
        layer: the layer, with its weights.
        hidden_NLD: what enters it.
        domain_N: the number of each sequence's domain.
        opening: tokens that open a text; their weights follow the same rule on the same scale.
        pictured: what comes with the tokens in a vision-language model; padding is left out.
        image_weight: what an error in a token of a picture is worth, relative to one in a token of text.

    Raises:
        WorkError: the FFN's inputs or outputs are NaN or infinite.
    """
    found = tapped(stream, index, layer, hidden_NLD, text="calibration")
    sample = activations(stream, index, layer, found, domain_N, opening)
    return sample if pictured is None else weighed(sample, pictured, image_weight)


def weighed(sample: LayerActivations, pictured: Pictured, image_weight: float) -> LayerActivations:
    """Leave out padding, and weigh the tokens of pictures; the mean weight stays 1."""
    is_image_T, keep_T = pictured.is_image_NL.flatten(), ~pictured.is_padding_NL.flatten()
    is_image_T, keep_T = is_image_T.to(sample.weight_T.device), keep_T.to(sample.weight_T.device)
    # an error counts as much as the square of its weight
    weight_T = torch.where(is_image_T, sample.weight_T * image_weight**0.5, sample.weight_T)
    kept = replace(sample, weight_T=weight_T).take(keep_T)
    return replace(kept, weight_T=kept.weight_T / kept.weight_T.mean())


def activations(
    stream: LayerwiseModel,
    index: int,
    layer: nn.Module,
    found: Tapped,
    domain_N: Tensor,
    opening: OpeningTargets | None = None,
) -> LayerActivations:
    """Keep what concerns a layer's FFN of what was seen when it ran, as `calibrate` does.

    Raises:
        WorkError: the FFN's inputs or outputs are NaN or infinite.
    """
    input_TD, output_TD, after_NLD = found
    check_numbers({"the FFN's inputs": input_TD, "the FFN's outputs": output_TD}, f"layer {index}", stream.dtype)
    norm_T = output_TD.float().norm(dim=1)
    least = max(MIN_NORM * norm_T.median().item(), 1e-30)
    weight_T = norm_T.clamp(min=least).reciprocal()
    mean = weight_T.mean()
    sample = LayerActivations(
        ffn=gated_ffn(layer.get_submodule(ffn_name(layer))),
        input_TD=input_TD,
        output_TD=output_TD,
        weight_T=weight_T / mean,
        domain_T=domain_N.to(input_TD.device).repeat_interleave(after_NLD.shape[1]),
    )
    if opening is None:
        return sample
    input_MD, target_MD = opening.input_MD, opening.target_MD
    weight_M = target_MD.float().norm(dim=1).clamp(min=least).reciprocal() / mean
    domain_M = torch.zeros(len(input_MD), dtype=torch.int64, device=input_MD.device)
    return replace(sample, opening=LayerActivations(sample.ffn, input_MD, target_MD, weight_M, domain_M))


def tapped(
    stream: LayerwiseModel, index: int, layer: nn.Module, hidden_NLD: Tensor, ffn: nn.Module | None = None,
    text: str = "",
) -> Tapped:  # fmt: skip
    """Run a layer, with its own FFN or `ffn` in its place, and keep what enters and leaves that."""
    tap = Tap(ffn or layer.get_submodule(ffn_name(layer)))
    with replaced_ffn(layer, tap):
        after_NLD = stream.run(index, layer, hidden_NLD, text)
    return Tapped(torch.cat(tap.inputs), torch.cat(tap.outputs), after_NLD)


def layer_generator(seed: int, index: int) -> torch.Generator:
    """Make the source of what is random in a layer: one layer's numbers do not hang on another's."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def relative_weights(target_TD: Tensor) -> Tensor:
    """Weigh tokens by `1 / ‖target‖`, mean 1: an error counts relative to what was to come out."""
    norm_T = target_TD.float().norm(dim=1)
    weight_T = norm_T.clamp(min=max(MIN_NORM * norm_T.median().item(), 1e-30)).reciprocal()
    return weight_T / weight_T.mean()


def relative_error(sample: LayerActivations, output_TD: Tensor) -> float:
    """Measure `sqrt(sum w² ‖y - output‖² / sum w² ‖y‖²)` over the sample's tokens."""
    wrong = right = 0.0
    for first in range(0, sample.tokens, CHUNK_TOKENS):
        part = slice(first, first + CHUNK_TOKENS)
        y_CD, square_C = sample.output_TD[part].float(), sample.weight_T[part].square()
        wrong += ((output_TD[part].float() - y_CD).square().sum(1) * square_C).sum().item()
        right += (y_CD.square().sum(1) * square_C).sum().item()
    return (wrong / max(right, 1e-30)) ** 0.5


class StreamError(NamedTuple):
    """How far converted layers have taken the residual stream from the dense one's, over tokens t."""

    residual_error: float
    """The mean of `‖c_t - d_t‖ / ‖d_t‖`."""
    sink_norm: float | None
    """The mean of `‖c_t‖ / ‖d_t‖` over attention sinks, told by `‖d_t‖ > 4 median ‖d‖`; None where there are none."""


def residual_stream_error(dense_NLD: Tensor, converted_NLD: Tensor, is_padding_NL: Tensor | None = None) -> StreamError:
    """Measure how far the residual stream [N, L, D] of converted layers is from that of dense ones."""
    dense_TD, converted_TD = dense_NLD.flatten(0, 1).float(), converted_NLD.flatten(0, 1).float()
    if is_padding_NL is not None:
        keep_T = ~is_padding_NL.flatten().to(dense_TD.device)
        dense_TD, converted_TD = dense_TD[keep_T], converted_TD[keep_T]
    norm_T = dense_TD.norm(dim=1)
    sinks_T = norm_T > SINK * norm_T.median()
    error = ((converted_TD - dense_TD).norm(dim=1) / norm_T.clamp(min=1e-30)).mean().item()
    kept = (converted_TD.norm(dim=1) / norm_T)[sinks_T].mean().item() if sinks_T.any() else None
    return StreamError(error, kept)
