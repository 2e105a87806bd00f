"""The contract of a native form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError, WorkError

Tensors = dict[str, Tensor]
"""A decoder layer's tensors by their name in the layer, e.g. `mlp.gate.weight`."""


@dataclass(frozen=True, kw_only=True)
class NativeForm(ABC):
    """An architecture of stock transformers that holds a converted model, layer by layer and without loss.

    `working_layer(layer(x)) == x`, bit by bit: all factors are powers of two.
    """

    selection_bias: ClassVar[bool] = False
    """Whether its router can add a constant to each expert's score, which serves the selection only."""
    sources: ClassVar[tuple[str, ...]] = ()
    """Model types of the dense families that it can hold."""
    engines: ClassVar[tuple[str, ...]] = ()
    """Which load it: of `transformers`, `vllm`, `sglang`, `mlx`."""

    @property
    def name(self) -> str:
        """The `model_type` in transformers, which is also the file's name."""
        return type(self).__module__.rpartition(".")[2]

    def check_bias(self, has_bias: bool) -> None:
        """Raises InputError if the router has a selection bias and the form has no place for it."""
        if has_bias and not self.selection_bias:
            raise InputError(
                f"this model cannot be written as {self.name}: its router adds a constant to each expert's score; "
                "convert with --partition specialists or --router linear:intercept=False"
            )

    @abstractmethod
    def config(self, working: Any) -> dict[str, Any]:
        """What `config.json` says, for a working form's configuration.

        Raises:
            InputError: the form cannot express that model; the message says why and what can.
        """

    @abstractmethod
    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        """A decoder layer of the working form as this form has it."""

    def layer_exactly(self, tensors: Tensors, working: Any) -> Tensors:
        """`layer`, having seen that it can be undone bit by bit.

        Raises:
            WorkError: it cannot, as when a factor makes a weight too small for its dtype.
        """
        native = self.layer(tensors, working)
        back = self.working_layer(native, working)
        lost = [
            n for n, t in tensors.items() if not (n in back and back[n].dtype == t.dtype and torch.equal(back[n], t))
        ]
        if lost:
            raise WorkError(f"{self.name} does not hold {lost[0]} without loss; use --format moesaic")
        return native

    @abstractmethod
    def working_layer(self, tensors: Tensors, working: Any) -> Tensors:
        """The inverse of `layer`."""
