"""The average of what learns over the last steps, which small batches disturb less than the last step itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """An exponential moving average of tensors: `a += (1 - d) (p - a)` after each step, d the decay, less at first."""

    def __init__(self, named: Mapping[str, Tensor], decay: float) -> None:
        self.named, self.decay = named, decay
        self.tensors = {name: p.detach().clone() for name, p in named.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take a step's weights in; the first ones are not remembered as long as the later ones."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.tensors.items():
            tensor.lerp_(self.named[name].detach(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the averages stand where what learns stands, until the end of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.tensors.items():  # copied, not exchanged: shards know their memory
            before = self.named[name].detach().clone()
            self.named[name].copy_(tensor)
            tensor.copy_(before)
