"""Run a checkpoint layer by layer: one decoder layer's weights in memory at a time.

Shapes: N sequences, L tokens in one, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..checkpoint.reader import Checkpoint
from ..compat import tied_weights
from .families import check_convertible, decoder_layers, layers_prefix, text_config, text_tower
from .integrity import check_contents, check_finite, model_on_meta, read_config

log = logging.getLogger("moesaic")
BATCH_TOKENS = 2_048
"""Tokens that run through a layer at once: enough for products at full speed, few for memory."""


class Stub(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with and passes on `replacement`, or its input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.arguments: dict[int, dict[str, Any]] = {}
        """By the sequences' length."""
        self.replacement: Tensor | None = None

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments[hidden_states.shape[1]] = hidden_states, arguments
        return hidden_states if self.replacement is None else self.replacement


def batches(sequences_NL: Tensor) -> tuple[Tensor, ...]:
    """Cut whole sequences into batches, [B, L, ...] each, of at most `BATCH_TOKENS` tokens if one has no more."""
    return sequences_NL.split(max(1, BATCH_TOKENS // sequences_NL.shape[1]))


def text_model(whole: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Make the causal language model in a model that takes more than text, without weights; or return the model.

    Raises:
        InputError: transformers has no such model alone.
    """
    config = text_config(whole.config)
    if config is whole.config:
        return whole
    config.tie_word_embeddings = bool(tied_weights(whole))
    return model_on_meta(config, folder, dtype)


def text_names(whole: PreTrainedModel, text: PreTrainedModel, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Name the tensors of the text part as the causal language model alone does; those of other parts are left out."""
    ours, theirs = (layers_prefix(model).removesuffix("layers.") for model in (text, whole))
    named = {ours + n.removeprefix(theirs) if n.startswith(theirs) else n: sources for n, sources in found.items()}
    return {name: sources for name, sources in named.items() if name in text.state_dict()}


class LayerwiseModel:
    """A checkpoint whose decoder layers are loaded when used; everything around them stays in memory.

    The family's own forward runs with stubs for layers, which yields what each layer is called with (masks, rotary
    embeddings) and, given the last hidden states, the logits: no family's forward is written again. Of a
    vision-language model it is the text part.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = Checkpoint(folder)
        self.dtype, self.device = dtype, device
        whole = model_on_meta(read_config(folder), folder, dtype)
        found = check_contents(whole, self.checkpoint)
        self.model: Any = text_model(whole, folder, dtype)
        if self.model is not whole:
            log.warning("%s takes images too; its text part alone is converted", whole.config.model_type)
            found = text_names(whole, self.model, found)
        self.model.eval()
        self.layers = list(decoder_layers(self.model))
        check_convertible(self.layers)
        self.stubs = [Stub() for _ in self.layers]
        self.prefix = layers_prefix(self.model)
        self.on_disk = {name: source for name, (source, *_) in found.items()}
        """The checkpoint's names by the model's."""
        text_tower(self.model).layers = nn.ModuleList(self.stubs)

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    def check_finite(self) -> None:
        """Check that all weights are numbers, each read once.

        Raises:
            InputError: one is NaN or infinite.
        """
        check_finite(self._tensors(list(self.on_disk)), self.checkpoint.folder)

    def embeddings_and_head(self) -> Iterator[tuple[str, Tensor]]:
        """Read embeddings, final norm and head by name, as on disk; tied ones once."""
        tied = tied_weights(self.model)
        yield from self._tensors(
            [name for name in self.on_disk if not name.startswith(self.prefix) and name not in tied]
        )

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors by the model's names, each file opened once."""
        ours = {self.on_disk[name]: name for name in names}
        for name, tensor in self.checkpoint.items(list(ours)):
            yield ours[name], tensor

    def parameters(self) -> int:
        """Count the parameters of the dense model."""
        modules = [self.model, *self.layers]
        return sum(p.numel() for module in modules for p in module.parameters())

    def load_embeddings_and_head(self) -> None:
        """Load embeddings, final norm and head."""
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in self.embeddings_and_head()}
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()
        self.model.to(self.device)

    def drop_embeddings_and_head(self) -> None:
        """Forget what `load_embeddings_and_head` loaded, to make room."""
        self.model.to("meta")

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load a decoder layer with its dense weights; on leaving, its memory is released."""
        layer, prefix = self.layers[index], f"{self.prefix}{index}."
        tensors = {
            name.removeprefix(prefix): tensor.to(self.device, self.dtype)
            for name, tensor in self._tensors([name for name in self.on_disk if name.startswith(prefix)])
        }
        layer.load_state_dict(tensors, strict=False, assign=True)
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def embed(self, tokens_NL: Tensor) -> Tensor:
        """Compute what enters the first layer, [N, L, D]; from then on `run` knows how to call layers on length L."""
        parts = []
        for tokens_BL in (*batches(tokens_NL), tokens_NL[:1]):  # one alone is last: its arguments fit any batch
            self.model.base_model(input_ids=tokens_BL.to(self.device), use_cache=False)
            hidden = self.stubs[0].hidden
            assert hidden is not None
            parts.append(hidden)
        return torch.cat(parts[:-1])

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module, hidden_NLD: Tensor) -> Tensor:
        """Run a decoder layer on sequences of a length that was embedded before; returns what leaves it, [N, L, D]."""
        arguments = self.stubs[index].arguments[hidden_NLD.shape[1]]
        return torch.cat([layer(hidden_BLD, **arguments) for hidden_BLD in batches(hidden_NLD)])

    @torch.no_grad()
    def token_losses(self, tokens_NL: Tensor, hidden_NLD: Tensor) -> Tensor:
        """Compute the next-token losses in nats from the last layer's output [N, L, D]: float32 [N, L - 1]."""
        losses = []
        for tokens_1L, hidden_1LD in zip(tokens_NL.split(1), hidden_NLD.split(1), strict=True):
            self.stubs[-1].replacement = hidden_1LD
            logits = self.model(input_ids=tokens_1L.to(self.device), use_cache=False).logits[0, :-1]
            losses.append(cross_entropy(logits.float(), tokens_1L[0, 1:].to(self.device), reduction="none"))
        self.stubs[-1].replacement = None
        return torch.stack(losses)
