"""Sequences to train on, and those held out.

Shapes: N sequences, L tokens in one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.documents import Document
from ..calibration.text import by_domain
from ..calibration.windows import Window, bos, check_text, packed_windows, shares
from ..errors import InputError
from ..models.pictured import Pictured


@dataclass(frozen=True)
class Samples:
    """Token sequences, and which of their tokens count in the loss (a prompt's do not)."""

    tokens_NL: Tensor
    scored_NL: Tensor
    pictured: Pictured | None = None
    """What comes with the sequences in a vision-language model."""
    number_N: Tensor | None = None
    """Of each sequence among those that it was taken from; None: its own place."""

    @property
    def numbers(self) -> list[int]:
        """The number of each sequence among all."""
        return list(range(len(self))) if self.number_N is None else self.number_N.tolist()

    def __len__(self) -> int:
        return len(self.tokens_NL)

    def take(self, index_N: Tensor) -> Samples:
        """Take some of the sequences."""
        pictured = None if self.pictured is None else self.pictured.take(index_N)
        own_N = torch.arange(len(self)) if self.number_N is None else self.number_N
        return Samples(self.tokens_NL[index_N], self.scored_NL[index_N], pictured, own_N[index_N])

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Put together what the model takes beside `input_ids`, of sequences that are `alike`."""
        found: dict[str, list[Tensor]] = {}
        for inputs in self.pictured.inputs if self.pictured else ():
            for name, tensor in inputs.items():
                found.setdefault(name, []).append(tensor)
        joined = {name: torch.cat(tensors) for name, tensors in found.items()}
        return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in joined.items()}

    def alike(self, index_N: Tensor) -> list[Samples]:
        """Take some of the sequences, in parts of one length and with pictures alike, which one call can take."""
        taken = self.take(index_N)
        if taken.pictured is None:
            return [taken]
        found: dict[tuple[int, str], list[int]] = {}
        for number, (inputs, length) in enumerate(zip(taken.pictured.inputs, taken.pictured.lengths(), strict=True)):
            shapes = sorted((name, *tensor.shape[1:]) for name, tensor in inputs.items())
            found.setdefault((length, str(shapes)), []).append(number)
        return [taken.take(torch.tensor(rows)).trimmed(length) for (length, _), rows in found.items()]

    def trimmed(self, length: int) -> Samples:
        """Cut all sequences to their first `length` tokens."""
        pictured = None if self.pictured is None else self.pictured.trimmed(length)
        return Samples(self.tokens_NL[:, :length], self.scored_NL[:, :length], pictured, self.number_N)

    def fingerprint(self) -> str:
        """Hash all tokens and which of them count: SHA-256."""
        own = (self.tokens_NL, self.scored_NL, *(self.pictured.tensors() if self.pictured else ()))
        digest = hashlib.sha256()
        for tensor in own:
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def count(self) -> int:
        """Count the tokens that are no padding."""
        return self.tokens_NL.numel() if self.pictured is None else sum(self.pictured.lengths())

    def scored(self) -> int:
        """Count the tokens that are predicted and count in the loss."""
        return int(self.scored_NL[:, 1:].sum())


def make_samples(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    held_out: int,
    seed: int,
) -> tuple[Samples, Samples]:
    """Cut packed documents into windows, domains in equal shares, in a random order of the seed.

    At most `samples` and `held_out` windows; those held out are the end of each domain, with a window between that is
    not used, so that they are other documents where a domain has several.

    Returns:
        Samples to train on, and those held out.

    Raises:
        InputError: no domain holds three windows, or nothing counts in the loss.
    """
    check_text(documents)
    start, wanted = bos(tokenizer), samples + held_out + 1
    domains = by_domain(documents)
    cut = [packed_windows(texts, tokenizer, start, window - len(start), wanted) for texts in domains]
    weights = [texts[0].share for texts in domains]
    spare = shares([len(w) // 3 for w in cut], held_out, weights)
    if not sum(spare):
        raise InputError(
            f"no file of the text holds three windows of {window} tokens, one of them to be held out: give more text "
            "or a shorter --window"
        )
    rest = [w[: len(w) - n - 1] if n else w for w, n in zip(cut, spare, strict=True)]
    share = shares(list(map(len, rest)), samples, weights)
    even = [[w[i * len(w) // n] for i in range(n)] for w, n in zip(rest, share, strict=True) if n]
    train = _samples([window for windows in even for window in windows])
    held = _samples([window for w, n in zip(cut, spare, strict=True) for window in w[len(w) - n :]])
    train = train.take(torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)))
    if not train.scored() or not held.scored():
        raise InputError("no token of the text counts in the loss: prompts have no responses; give responses too")
    return train, held


def _samples(windows: list[Window]) -> Samples:
    tokens, scored = zip(*windows, strict=True)
    return Samples(torch.tensor(tokens), torch.tensor(scored))


def step_sequences(count: int, batch: int, step: int, seed: int) -> Tensor:
    """List the numbers of a step's sequences: each pass over the samples has its own order, given by the seed."""
    position_B = torch.arange(step * batch, (step + 1) * batch)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        for epoch in (position_B // count).unique().tolist()
    }
    return torch.stack([orders[p // count][p % count] for p in position_B.tolist()])
