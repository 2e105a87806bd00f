"""What calibration knows of one FFN: its weights, its inputs, its outputs, and what an error in each token is worth.

Shapes: T tokens, C tokens of one chunk, D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.families import GatedFFN

CHUNK_TOKENS = 2_048


class Moments(NamedTuple):
    """Means over tokens of each neuron's activation h, float32 [F] each."""

    mean_F: Tensor
    square_F: Tensor
    """Of h²."""
    saliency_F: Tensor
    """`mean (w h)² ‖Wd‖²`, w the tokens' weights."""


@dataclass(frozen=True)
class LayerActivations:
    """One layer's FFN and the calibration tokens that reach it."""

    ffn: GatedFFN
    input_TD: Tensor
    """FFN input (normalised residual stream) on the already converted prefix."""
    output_TD: Tensor
    """The dense FFN's output on that input."""
    weight_T: Tensor
    """Token weights `1 / ‖y‖`, mean 1: an error counts relative to the output."""
    domain_T: Tensor
    """The number of the text's domain that each token comes from, int64."""
    opening: LayerActivations | None = None
    """Tokens that open a text, with targets that bring back the *dense* model's stream: recovery fits them too."""
    chosen_TK: Tensor | None = None
    """The experts of each token, int64, where they are decided for the whole model ahead of its layers."""

    @property
    def tokens(self) -> int:
        return self.input_TD.shape[0]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Compute (slice of tokens, activations [C, F]) chunk by chunk; they are computed anew and never all kept."""
        for first in range(0, self.tokens, CHUNK_TOKENS):
            part = slice(first, first + CHUNK_TOKENS)
            yield part, self.ffn.hidden(self.input_TD[part])

    def parts(self) -> Iterator[LayerActivations]:
        """Cut the tokens into chunks."""
        for first in range(0, self.tokens, CHUNK_TOKENS):
            yield self.take(slice(first, first + CHUNK_TOKENS))

    def subsample(self, tokens: int, generator: torch.Generator) -> LayerActivations:
        """Take at most `tokens` of the tokens, drawn without replacement."""
        if tokens >= self.tokens:
            return self
        return self.take(torch.randperm(self.tokens, generator=generator)[:tokens].sort().values)

    def every(self, step: int) -> LayerActivations:
        """Take every `step`-th token."""
        return self if step == 1 else self.take(slice(None, None, step))

    def take(self, pick: Tensor | slice) -> LayerActivations:
        """Take those of the tokens, by index or slice."""
        names = ("input_TD", "output_TD", "weight_T", "domain_T", "chosen_TK")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{name: tensor[pick] for name, tensor in found.items() if tensor is not None})

    def moments(self) -> Moments:
        """Sum up each neuron over all tokens."""
        size = self.ffn.intermediate_size
        total, square, weighted = (torch.zeros(size, device=self.input_TD.device) for _ in range(3))
        for part, h_CF in self.chunks():
            h_CF = h_CF.float()
            total += h_CF.sum(0)
            square += h_CF.square().sum(0)
            weighted += (h_CF * self.weight_T[part, None]).square().sum(0)
        saliency = weighted * self.ffn.down_DF.float().square().sum(0)
        return Moments(total / self.tokens, square / self.tokens, saliency / self.tokens)

    def activation_rates(self) -> list[float]:
        """Measure how often each neuron is among a token's tenth that contribute most, over all tokens.

        Returns:
            The per-cent points 0, 1, ... 100 over neurons of these rates.
        """
        h_TF = torch.cat([h_CF.float() for _, h_CF in self.chunks()]).abs() * self.ffn.down_DF.float().norm(dim=0)
        threshold_T1 = h_TF.kthvalue(max(1, int(0.9 * h_TF.shape[1])), dim=1, keepdim=True).values
        rate_F = (h_TF > threshold_T1).float().mean(0)
        return [round(rate, 4) for rate in rate_F.quantile(torch.linspace(0, 1, 101, device=rate_F.device)).tolist()]
