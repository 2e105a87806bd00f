"""Closed-form healing: a layer's down-projection solved again so that the residual stream is the source's after a gap.

Shapes: N sequences, L tokens in one, T = N L tokens of all texts, D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...calibration.layers import relative_weights, tapped
from ...calibration.sinks import ffn_factor
from ...models.families import GatedFFN, ffn_layout, ffn_name, gated_ffn
from ...models.layerwise import LayerwiseModel
from ...models.norms import ffn_norm, norm_offset
from ...recovery._refit import FitSample, refit, weighted_error

Streams = Mapping[str, Tensor]
"""The residual stream [N, L, D] of each text."""


class LayerEnds(NamedTuple):
    """What was seen when a layer ran on all texts."""

    input_TD: Tensor
    """What enters its FFN."""
    output_TD: Tensor
    """What its FFN says."""
    after_TD: Tensor
    """What leaves the layer."""


@torch.no_grad()
def heal(layerwise: LayerwiseModel, index: int, layer: nn.Module, hidden: Streams, target: Streams) -> list[str]:
    """Fit a layer so that what leaves it is nearest to `target`, each token's error relative to the target's norm.

    Where the layer adds `c` times its FFN's output to the stream, `refit` solves for the down-projection W of
    `min sum_t w_t² ‖(d_t - p_t) / c + y_t - W h_t‖²` plus its ridge: d the target, p what leaves the layer as it is, y
    its FFN's output, w = 1 / ‖d‖. ReplaceMe (arXiv 2505.02819) solves for W = W_own (1 + T), T [D, D]. Where a norm
    follows the FFN its down-projection is fitted to the target's direction, then the norm's weight by channel.
    A change that would make the error on these tokens larger, as rounding can, is not made.

    Args:
        layerwise: the model.
        index: the layer's number in it.
        layer: the layer with its weights, which are changed in place.
        hidden: what enters it, by text.
        target: what should leave it.

    Returns:
        The names of the parameters in the layer that changed.
    """
    name = ffn_name(layer)
    module, norm = layer.get_submodule(name), ffn_norm(layer)
    layout = ffn_layout(module)
    assert layout is not None
    seen = run_and_record(layerwise, index, layer, hidden)
    target_TD = torch.cat([target[text].flatten(0, 1) for text in hidden])
    weight_T, ffn = relative_weights(target_TD), gated_ffn(module)
    down = f"{name}.{layout.down}.weight"
    if norm is not None:
        changed = heal_normed(ffn, norm, seen, target_TD, weight_T)
        norms = next(own for own, child in layer.named_children() if child is norm)
        return [{"down": down, "norm": f"{norms}.weight"}[part] for part in changed]
    factor = ffn_factor(layerwise, index, layer, next(iter(hidden.values()))[:1])
    if not factor:
        return []
    wanted_TD = seen.output_TD.float() + (target_TD.float() - seen.after_TD.float()) / factor
    rows = FitSample(seen.input_TD, wanted_TD, weight_T)
    new_DF = refit(ffn.hidden, ffn.down_DF, rows).to(ffn.down_DF.dtype)
    if weighted_error(rows, ffn_output(ffn, rows, new_DF)) > weighted_error(rows, seen.output_TD):
        return []
    ffn.down_DF.copy_(new_DF)
    return [down]


def run_and_record(layerwise: LayerwiseModel, index: int, layer: nn.Module, hidden: Streams) -> LayerEnds:
    """Run a layer on all texts, and keep what enters and leaves its FFN and what leaves the layer."""
    found = [tapped(layerwise, index, layer, hidden_NLD) for hidden_NLD in hidden.values()]
    return LayerEnds(
        torch.cat([one.input_TD for one in found]), torch.cat([one.output_TD for one in found]),
        torch.cat([one.after_NLD.flatten(0, 1) for one in found]),
    )  # fmt: skip


def ffn_output(ffn: GatedFFN, rows: FitSample, down_DF: Tensor) -> Tensor:
    """Compute what the FFN says with another down-projection, [T, D]."""
    return torch.cat([linear(ffn.hidden(part.input_TD), down_DF) for part in rows.chunks()])


def heal_normed(ffn: GatedFFN, norm: nn.Module, seen: LayerEnds, target_TD: Tensor, weight_T: Tensor) -> list[str]:
    """Fit an FFN before a norm, `stream + g * y / rms(y)`: first y's direction, then g; names what changed.

    The first is kept only if both together are better than g alone, which is least squares by channel.
    """
    weight, offset = norm.get_parameter("weight"), norm_offset(norm)
    gain_D = weight.float() + offset
    scaled = norm(seen.output_TD).float()
    rows = FitSample(seen.input_TD, target_TD.float() - seen.after_TD.float() + scaled, weight_T)
    toward_TD = rows.target_TD / torch.where(gain_D.abs() < 1e-3, 1e-3, gain_D)
    size_T1 = seen.output_TD.float().square().mean(1, keepdim=True).sqrt()
    toward_TD *= size_T1 / toward_TD.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    relative = weight_T / size_T1.squeeze(1).clamp(min=1e-30)  # the norm takes the size away
    new_DF = refit(ffn.hidden, ffn.down_DF, FitSample(seen.input_TD, toward_TD, relative / relative.mean()))
    new_DF = new_DF.to(ffn.down_DF.dtype)
    best, found = weighted_error(rows, scaled), partial(fitted_gain, norm, rows, gain_D)
    choices = [(seen.output_TD, ["norm"]), (ffn_output(ffn, rows, new_DF), ["down", "norm"])]
    taken: list[str] = []
    old = weight.clone()
    kept = old
    for output_TD, names in choices:
        new = (found(output_TD) - offset).to(weight.dtype)
        weight.copy_(new)
        if (error := weighted_error(rows, norm(output_TD))) <= best:
            best, taken, kept = error, names, new
        weight.copy_(old)
    weight.copy_(kept)
    if "down" in taken:
        ffn.down_DF.copy_(new_DF)
    return taken


def fitted_gain(norm: nn.Module, rows: FitSample, gain_D: Tensor, output_TD: Tensor) -> Tensor:
    """Solve `min_g sum_t w_t² (u_td - g_d n_td)²` by channel d, n the output after the norm without its weight."""
    safe_D = torch.where(gain_D.abs() < 1e-3, 1.0, gain_D)
    n_TD = norm(output_TD).float() / safe_D
    square_T1 = rows.weight_T.square()[:, None]
    fitted_D = (square_T1 * n_TD * rows.target_TD).sum(0) / (square_T1 * n_TD.square()).sum(0).clamp(min=1e-30)
    return torch.where(gain_D.abs() < 1e-3, gain_D, fitted_D)
