"""Run a checkpoint layer by layer: one decoder layer's weights in memory at a time.

Shapes: N sequences, L tokens in one, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..checkpoint.reader import Checkpoint
from ..compat import tied_weights
from ..errors import InputError
from .families import EXPERT_PARTS, decoder_layers, layers_prefix, settle_width, text_config, text_tower
from .integrity import check_contents, check_finite, is_transposed, model_on_meta, read_config
from .pictured import Pictured
from .stubs import Calls, Seen, Stub

BATCH_TOKENS = 2_048
"""Tokens that run through a layer at once: enough for products at full speed, few for memory."""
EXPERT = re.compile(r"(?P<before>.*\bexperts\.)(?P<number>\d+)\.(?P<part>\w+)\.weight")
"""The name of one expert's matrix in a checkpoint that keeps each for itself."""


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


class Joined:
    """One tensor [E, ...] of a model whose parts are each expert's own in the checkpoint, as Mixtral's and Qwen's are.

    Args:
        name: the model's.
        sources: the checkpoint's, of all experts.

    Raises:
        InputError: parts that are not known.
    """

    def __init__(self, name: str, sources: list[str]) -> None:
        found = [EXPERT.fullmatch(source) for source in sources]
        parts = {match["part"] for match in found if match}
        order = next((known for known in EXPERT_PARTS if parts == set(known)), ())
        if not order or not all(found):
            raise InputError(
                f"'{name}' is joined of {sources[0]} and {len(sources) - 1} more, in an order not known here"
            )
        self.parts = order
        self.before = next(match["before"] for match in found if match)
        self.experts = 1 + max(int(match["number"]) for match in found if match)

    def sources(self, expert: int) -> list[str]:
        """Name the checkpoint's tensors of one expert, in the order in which they are joined."""
        return [f"{self.before}{expert}.{part}.weight" for part in self.parts]

    def all_sources(self) -> list[str]:
        """Name the checkpoint's tensors of all experts."""
        return [source for expert in range(self.experts) for source in self.sources(expert)]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Put the experts' own tensors together."""
        return torch.stack([torch.cat([tensors[n] for n in self.sources(e)]) for e in range(self.experts)])

    def separate(self, joined: Tensor) -> dict[str, Tensor]:
        """Take them apart again, numbered from 0, however many there are."""
        rows = [row.chunk(len(self.parts)) for row in joined]
        return {name: part for e, row in enumerate(rows) for name, part in zip(self.sources(e), row, strict=True)}


class LayerwiseModel:
    """A checkpoint whose decoder layers are loaded when used; everything around them stays in memory.

    The family's own forward runs with stubs for layers, which yields what each layer is called with (masks, rotary
    embeddings) and, given the last hidden states, the logits: no family's forward is written again. Of a
    vision-language model it is the text part.

    Args:
        folder: the checkpoint's.
        dtype: to calculate in.
        device: to calculate on.
        experts: whether its layers may be Mixtures of Experts; else every layer has a dense FFN.

    Raises:
        InputError: damaged, or no such layers.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, experts: bool = False, text_only: bool = False
    ) -> None:
        self.checkpoint = Checkpoint(folder)
        self.dtype, self.device = dtype, device
        whole = model_on_meta(read_config(folder), folder, dtype)
        found = check_contents(whole, self.checkpoint)
        self.model: Any = text_model(whole, folder, dtype) if text_only else whole
        if self.model is not whole:
            found = text_names(whole, self.model, found)
        if not experts:
            settle_width(self.model)
        self.take_layers()
        self.on_disk = {name: sources[0] for name, sources in found.items() if len(sources) == 1}
        """The checkpoint's names by the model's, of what both have as one tensor."""
        shapes = self.checkpoint.shapes()
        wanted = {self.prefix + name: part.shape for name, part in nn.ModuleList(self.layers).state_dict().items()}
        self.turned = {name for name, own in self.on_disk.items() if is_transposed(wanted.get(name, ()), shapes[own])}
        """The model's names of banks of experts whose matrices are transposed in the checkpoint."""
        several = {name: sources for name, sources in found.items() if len(sources) > 1}
        self.joined = {name: Joined(name, sources) for name, sources in several.items()}
        """By the model's name, what the checkpoint has in parts."""
        if split := [name for name, sources in found.items() if not sources]:
            raise InputError(
                f"'{folder}': {split[0]} is a part of another tensor there, which is not read layer by layer"
            )

    def take_layers(self) -> None:
        """Put stubs in the place of the model's decoder layers, which stay without weights until `layer` loads one."""
        self.model.eval()
        self.layers = list(decoder_layers(self.model))
        self.stubs = [Stub() for _ in self.layers]
        self.calls: list[dict[str | int, Calls]] = [{} for _ in self.layers]
        """Of each layer, by the text's name or, where there are no pictures, the length of its sequences."""
        self.prefix = layers_prefix(self.model)
        text_tower(self.model).layers = nn.ModuleList(self.stubs)

    @property
    def config(self) -> Any:
        """The configuration of the language model; of a vision-language model, of its tower."""
        return self.model.config.get_text_config()

    @property
    def takes_pictures(self) -> bool:
        """Whether it is a vision-language model."""
        return self.config is not self.model.config

    def check_finite(self) -> None:
        """Check that all weights are numbers, each read once.

        Raises:
            InputError: one is NaN or infinite.
        """
        check_finite(self._tensors(list(self.on_disk)), self.checkpoint.folder)
        for joined in self.joined.values():
            check_finite(self.checkpoint.items(joined.all_sources()), self.checkpoint.folder)

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

    def num_parameters(self) -> int:
        """Count the parameters of the dense model."""
        tied = tied_weights(self.model)  # on the meta device they are parameters of their own
        own = sum(p.numel() for name, p in self.model.named_parameters() if name not in tied)
        return own + sum(p.numel() for layer in self.layers for p in layer.parameters())

    def load_embeddings_and_head(self) -> None:
        """Load embeddings, final norm and head."""
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in self.embeddings_and_head()}
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()
        self.model.to(self.device)

    def drop_embeddings_and_head(self) -> None:
        """Forget what `load_embeddings_and_head` loaded, to make room."""
        self.model.to("meta")

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """Read a decoder layer's tensors by their name in the layer, as on disk but for experts, which are joined."""
        prefix = f"{self.prefix}{index}."
        found = dict(self._tensors([name for name in self.on_disk if name.startswith(prefix)]))
        found |= {name: found[name].transpose(1, 2) for name in found.keys() & self.turned}
        for name, joined in self.joined.items():
            if name.startswith(prefix):
                found[name] = joined.join(dict(self.checkpoint.items(joined.all_sources())))
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load a decoder layer with its weights; on leaving, its memory is released."""
        layer = self.layers[index]
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in self.layer_tensors(index).items()}
        layer.load_state_dict(tensors, strict=False, assign=True)
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def embed(self, tokens_NL: Tensor, pictured: Pictured | None = None, text: str = "") -> Tensor:
        """Compute what enters the first layer, [N, L, D]; from then on `run` knows how to call layers on them.

        Args:
            tokens_NL: sequences.
            pictured: the pictures in them; None: there are none, and all sequences of that length are called alike.
            text: by what name `run` is to know sequences with pictures.
        """
        if pictured is not None:
            return self._embed_pictured(tokens_NL, pictured, text)
        parts = []
        for tokens_BL in (*batches(tokens_NL), tokens_NL[:1]):  # one alone is last: its arguments fit any batch
            self.model.base_model(input_ids=tokens_BL.to(self.device), use_cache=False)
            hidden = self.stubs[0].hidden
            assert hidden is not None
            parts.append(hidden)
        for calls, stub in zip(self.calls, self.stubs, strict=True):
            calls[tokens_NL.shape[1]] = Calls([stub.arguments], None)
        return torch.cat(parts[:-1])

    def _embed_pictured(self, tokens_NL: Tensor, pictured: Pictured, text: str) -> Tensor:
        """Embed one sequence at a time, since models call their layers differently on each (positions, masks)."""
        seen = [Seen() for _ in self.stubs]
        for tokens_1L, inputs in zip(tokens_NL.split(1), pictured.inputs, strict=True):
            moved = {
                name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
                for name, tensor in inputs.items()
            }
            self.model.base_model(input_ids=tokens_1L.to(self.device), **moved, use_cache=False)
            for index, (of_layer, stub) in enumerate(zip(seen, self.stubs, strict=True)):
                of_layer.see(stub, first=index == 0)
        following = [*seen[1:], None]
        for calls, of_layer, after in zip(self.calls, seen, following, strict=True):
            calls[text] = of_layer.calls(after)
        return torch.cat([hidden for hidden in seen[0].hidden if hidden is not None])

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module, hidden_NLD: Tensor, text: str = "") -> Tensor:
        """Run a decoder layer on sequences that were embedded before; returns what leaves it, [N, L, D].

        Args:
            index: the layer's number.
            layer: the layer, with its weights.
            hidden_NLD: what enters it.
            text: the name by which sequences with pictures were embedded; others are known by their length.
        """
        calls = self.calls[index].get(text) or self.calls[index][hidden_NLD.shape[1]]
        if len(calls.arguments) == 1:
            after_NLD = torch.cat([layer(hidden_BLD, **calls.arguments[0]) for hidden_BLD in batches(hidden_NLD)])
        else:
            pairs = zip(hidden_NLD.split(1), calls.arguments, strict=True)
            after_NLD = torch.cat([layer(hidden_1LD, **arguments) for hidden_1LD, arguments in pairs])
        return after_NLD if calls.added_NLD is None else after_NLD + calls.added_NLD

    @torch.no_grad()
    def token_losses(self, tokens_NL: Tensor, hidden_NLD: Tensor) -> Tensor:
        """Compute the next-token losses in nats from the last layer's output [N, L, D]: float32 [N, L - 1]."""
        losses = []
        for tokens_1L, hidden_1LD in zip(tokens_NL.split(1), hidden_NLD.split(1), strict=True):
            logits = self.logits(tokens_1L, hidden_1LD)[:-1]
            losses.append(cross_entropy(logits.float(), tokens_1L[0, 1:].to(self.device), reduction="none"))
        return torch.stack(losses)

    @torch.no_grad()
    def logits(self, tokens_1L: Tensor, hidden_1LD: Tensor) -> Tensor:
        """Compute the logits [L, V] of one sequence from the last layer's output."""
        self.stubs[-1].replacement = hidden_1LD
        try:
            return self.model(input_ids=tokens_1L.to(self.device), use_cache=False).logits[0]
        finally:
            self.stubs[-1].replacement = None
