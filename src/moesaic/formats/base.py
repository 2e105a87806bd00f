"""The contract of a native form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, WorkError

Tensors = dict[str, Tensor]
"""A decoder layer's tensors by their name in the layer, e.g. `mlp.gate.weight`."""


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """An architecture of stock transformers that holds a converted model, layer by layer and without loss.

    `moesaic_layer(layer(x)) == x`, bit by bit: all factors are powers of two.
    """

    selection_bias: ClassVar[bool] = False
    """Whether its router can add a constant to each expert's score, which serves the selection only."""
    sources: ClassVar[tuple[str, ...]] = ()
    """Model types of the dense families that it can hold."""
    loaded_by: ClassVar[tuple[str, ...]] = ()
    """Engines that have it: of `transformers`, `vllm`, `sglang`, `mlx`."""
    copies_shared: ClassVar[bool] = False
    """Whether each routed expert holds a copy of the shared one, for which the form has no place."""

    @property
    def name(self) -> str:
        """The `model_type` in transformers, which is also the file's name."""
        return type(self).__module__.rpartition(".")[2]

    def engines(self, working: Any) -> list[str]:
        """Those of `loaded_by` that run this model rightly. MLX does not scale rope for any of these architectures."""
        return [e for e in self.loaded_by if e != "mlx" or working.rope_parameters["rope_type"] == "default"]

    def copied_parameters(self, working: Any) -> tuple[int, int]:
        """(in all, run per token) parameters beyond the working form's, those of copies of the shared expert."""
        if not self.copies_shared:
            return 0, 0
        shared = 3 * working.hidden_size * working.shared_expert_intermediate_size * working.num_hidden_layers
        return shared * (working.num_experts - 1), shared * (working.num_experts_per_tok - 1)

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
        back = self.moesaic_layer(native, working)
        lost = [
            n for n, t in tensors.items() if not (n in back and back[n].dtype == t.dtype and torch.equal(back[n], t))
        ]
        if lost:
            raise WorkError(f"{self.name} does not hold {lost[0]} without loss; use --format moesaic")
        return native

    @abstractmethod
    def moesaic_layer(self, tensors: Tensors, working: Any) -> Tensors:
        """The inverse of `layer`."""
