"""Sequences of tokens that have pictures in them: what a model is called with beside the tokens, and what each is.

Shapes: N sequences, L tokens in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pictured:
    """What comes with sequences [N, L], of which some or all have pictures; shorter ones are padded at their end."""

    inputs: tuple[Mapping[str, Tensor], ...]
    """Of each sequence, what its model takes beside `input_ids`: `pixel_values` and its like, for a batch of one."""
    is_image_NL: Tensor
    """Which tokens stand for parts of pictures."""
    is_padding_NL: Tensor
    is_scored_NL: Tensor
    """Which tokens count in a loss: answers, and all of a plain text."""

    def take(self, pick_M: Tensor) -> Pictured:
        """Take some of the sequences, by index or mask."""
        index_M = torch.arange(len(self.inputs))[pick_M]
        return Pictured(
            tuple(self.inputs[i] for i in index_M.tolist()),
            self.is_image_NL[index_M], self.is_padding_NL[index_M], self.is_scored_NL[index_M],
        )  # fmt: skip

    def lengths(self) -> list[int]:
        """Count the tokens of each sequence that are no padding."""
        return (~self.is_padding_NL).sum(1).tolist()

    def trimmed(self, length: int) -> Pictured:
        """Cut all sequences to their first `length` tokens, which leaves out padding alone."""
        whole = self.is_padding_NL.shape[1]
        cut = tuple(
            {name: tensor[:, :length] if tensor.shape == (1, whole) else tensor for name, tensor in inputs.items()}
            for inputs in self.inputs
        )
        masks = (self.is_image_NL, self.is_padding_NL, self.is_scored_NL)
        return Pictured(cut, *(mask_NL[:, :length] for mask_NL in masks))

    @property
    def has_pictures_N(self) -> Tensor:
        """Tell which sequences have a picture."""
        return self.is_image_NL.any(1)

    def tensors(self) -> list[Tensor]:
        """List all that tells one set of sequences from another, in order."""
        of_inputs = [tensor for inputs in self.inputs for _, tensor in sorted(inputs.items())]
        return [*of_inputs, self.is_image_NL, self.is_padding_NL, self.is_scored_NL]


def plain(tokens_NL: Tensor) -> Pictured:
    """Describe sequences of text alone."""
    none = torch.zeros_like(tokens_NL, dtype=torch.bool)
    return Pictured(tuple({} for _ in tokens_NL), none, none, ~none)


def joined(parts: Sequence[Pictured]) -> Pictured:
    """Put sequences of one length together."""
    inputs = tuple(inputs for part in parts for inputs in part.inputs)
    masks = zip(*((part.is_image_NL, part.is_padding_NL, part.is_scored_NL) for part in parts), strict=True)
    return Pictured(inputs, *(torch.cat(of_parts) for of_parts in masks))
