"""How a model calls its decoder layers, found out by its own forward with stubs in their place.

Shapes: N sequences, L tokens in one, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

Arguments = dict[str, object]
"""Of one call, by name."""


class Stub(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with and passes on `replacement`, or zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.arguments: Arguments = {}
        self.replacement: Tensor | None = None

    def forward(self, hidden_states: Tensor, **arguments: object) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return torch.zeros_like(hidden_states) if self.replacement is None else self.replacement


class Calls(NamedTuple):
    """How a model calls one of its layers on some sequences."""

    arguments: list[Arguments]
    """Of each sequence what the layer takes beside hidden states; one alone fits any batch."""
    added_NLD: Tensor | None
    """What the model adds to the layer's output, as Qwen3-VL does in its first layers; None: nothing."""


def equal(one: object, other: object) -> bool:
    """Tell whether two arguments of a layer, tensors or containers of some, are the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one is other or one == other


class Seen:
    """What a layer's stub saw of sequences, one after the other."""

    def __init__(self) -> None:
        self.arguments: list[Arguments] = []
        self.hidden: list[Tensor | None] = []
        """What entered it; None where that was zero."""

    def see(self, stub: Stub, first: bool) -> None:
        """Keep what the stub was called with last; of stubs that are not the first only what is not zero."""
        assert stub.hidden is not None
        self.arguments.append(stub.arguments)
        self.hidden.append(stub.hidden if first or stub.hidden.any() else None)

    def calls(self, after: Seen | None) -> Calls:
        """Say how the layer is called, by what the one after it saw: a stub's output is zero, so that is added."""
        alike = all(equal(arguments, self.arguments[0]) for arguments in self.arguments)
        arguments = self.arguments[:1] if alike else self.arguments
        like = None if after is None else next((hidden for hidden in after.hidden if hidden is not None), None)
        if after is None or like is None:
            return Calls(arguments, None)
        return Calls(arguments, torch.cat([torch.zeros_like(like) if h is None else h for h in after.hidden]))
