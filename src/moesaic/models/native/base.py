"""The contract of a native form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]
"""A decoder layer's tensors by their name in the layer, e.g. `mlp.gate.weight`."""


@dataclass(frozen=True, kw_only=True)
class NativeForm(ABC):
    """An architecture of stock transformers that holds a converted model, layer by layer and without loss.

    `working_layer(layer(x)) == x`, bit by bit: all factors are powers of two.
    """

    @abstractmethod
    def config(self, working: Any) -> dict[str, Any]:
        """What `config.json` says, for a working form's configuration.

        Raises:
            InputError: the form cannot express that model; the message says why and what can.
        """

    @abstractmethod
    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        """A decoder layer of the working form as this form has it."""

    @abstractmethod
    def working_layer(self, tensors: Tensors, working: Any) -> Tensors:
        """The inverse of `layer`."""
