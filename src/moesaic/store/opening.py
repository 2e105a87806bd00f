"""Load a model whose experts stay where they are, and give it a store that brings them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import given, registry
from ..checkpoint.reader import Checkpoint
from ..compat import loaded_dtypes
from ..errors import InputError
from ..formats.converted import GENERATION, Converted, is_converted, read_generation
from ..machine import free_memory, give_back_memory
from ..models.integrity import check_finite, model_on_meta, read_config
from ..models.products import quicken
from ..moe.kernels import column_major, is_plain
from ..moe.modeling import MODEL_TYPE
from ..routing.base import Router
from .bias import prefer_resident
from .experts import NAME
from .layout import BANKS, Layout, blocks_with_experts, expert_shapes
from .memory import check_expert_memory, slots_within
from .policies.base import Policy
from .predict import VIEW, StoredBlock, predictor_of
from .source import ExpertSource, ExpertWeights, HostSource
from .store import ExpertStore

STORE = "expert_store"
"""The attribute of a model that holds its store."""
READERS = given.Limit(1, 256)
HOST_SHARE = 0.8
"""Of the host memory that is free, for the experts of a GPU; pinned memory cannot be swapped out."""


@dataclass(frozen=True)
class StoreOptions:
    """How a model's experts are kept."""

    expert_memory: str | int
    """Of the fast tier: bytes, `512MB`, `30%`, or `auto`."""
    cache: object = "look-ahead"
    """A cache policy or its name."""
    prefetch: bool = True
    """Whether the next layer's experts are read while a layer runs."""
    cache_bias: float = 0.0
    """How much routers prefer experts that are in the fast tier, of the range of a token's scores; not 0 changes the
    text."""
    readers: int = 2
    """Threads that read."""

    def policy(self) -> Policy:
        """Make the policy, having checked everything.

        Raises:
            InputError: an option that cannot be.
        """
        check_expert_memory(self.expert_memory)
        given.number("readers", self.readers, READERS)
        given.check(cache_bias=self.cache_bias)
        policy: Policy = registry.build("cache", self.cache)
        if not policy.online:
            raise InputError(
                f"--cache {registry.spec(policy)} needs to know all that follows, so it is for simulations only; give "
                "look-ahead"
            )
        return policy


def load_with_store(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, options: StoreOptions
) -> PreTrainedModel:
    """Load all of a model but its experts, which a store reads when they are used.

    The model has the store as `expert_store`, and runs the same products with the same weights as with all experts in
    memory.

    Raises:
        InputError: a dense model, experts that a store cannot hold, or a fast tier of less than one token's experts.
    """
    policy = options.policy()
    rest = _ours(checkpoint, dtype) if is_converted(checkpoint) else _stock(checkpoint, dtype)
    model = rest.model
    _assign(model, rest.tensors, device)
    blocks = blocks_with_experts(model, checkpoint.folder)
    check_router(model)
    like = expert_shapes(blocks, dtype)
    if device.type == "cpu" and is_plain(blocks[0].experts):
        like = like._replace(down=column_major(like.down))
    size = sum(part.numel() * part.dtype.itemsize for part in like)
    count, least = len(blocks) * blocks[0].num_experts, max(block.num_experts_per_tok for block in blocks)
    capacity = slots_within(options.expert_memory, size, count, least, device)
    source = slow_tier(rest.source, like, size * count, device)
    give_store(model, ExpertStore(source, like, capacity, policy, device, options.readers), options.prefetch)
    model.set_experts_implementation(NAME)
    if options.cache_bias:
        prefer_resident(model, getattr(model, STORE), options.cache_bias)
    quicken(model)
    give_back_memory()
    return model.eval()


def slow_tier(source: ExpertSource, like: ExpertWeights, all_experts: int, device: torch.device) -> ExpertSource:
    """Choose where experts wait: on disk; those of a GPU in pinned host memory, where all of them fit.

    Args:
        source: the disk.
        like: an expert's shapes and dtype.
        all_experts: bytes of all experts.
        device: whose memory is the fast tier.
    """
    if device.type != "cuda":
        return source
    free = free_memory(torch.device("cpu"))
    if all_experts <= HOST_SHARE * free:
        return HostSource(source, like, pinned=True)
    logging.getLogger("moesaic").warning(
        f"all experts take {all_experts / 1e9:.1f} GB, and {free / 1e9:.1f} GB of host memory are free: they are read "
        "from disk when they are used"
    )
    return source


def give_store(model: PreTrainedModel, store: ExpertStore, prefetch: bool = True) -> None:
    """Let a model's experts come from a store; one that it had before is closed."""
    if (before := store_of(model)) is not None:
        before.close()
    blocks = blocks_with_experts(model, Path(str(model.config.name_or_path)))
    predictor = predictor_of(model, blocks, prefetch=prefetch)
    for number, block in enumerate(blocks):
        setattr(block.experts, VIEW, StoredBlock(store, number, predictor, prefetch=prefetch))
    setattr(model, STORE, store)


def check_router(model: PreTrainedModel) -> None:
    """Check that a model's routers do not look into the experts.

    Raises:
        InputError: they do.
    """
    name = getattr(model.config.get_text_config(), "router", None)
    if name is None or model.config.model_type != MODEL_TYPE:
        return
    router: type[Router] = registry.method_class("router", name, imported_only=True)
    if router.runs_all_experts:
        raise InputError(
            f"the router '{name}' looks at what all experts say before it chooses, so that a store saves nothing; "
            "leave --expert-memory out"
        )


@dataclass(frozen=True)
class _Rest:
    """A model without weights, those that are not experts', and where the experts are."""

    model: PreTrainedModel
    tensors: Iterator[tuple[str, Tensor]]
    source: ExpertSource


def _ours(checkpoint: Checkpoint, dtype: torch.dtype) -> _Rest:
    converted = Converted(checkpoint.folder)
    layout = Layout(converted.checkpoint, converted.format.expert_factor(converted.config))
    model = model_on_meta(converted.whole, checkpoint.folder, dtype)
    if (checkpoint.folder / GENERATION).is_file():
        model.generation_config = read_generation(checkpoint.folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from converted.embeddings_and_head().items()
        for index in range(converted.config.num_hidden_layers):
            for name, tensor in converted.layer_without_experts(index).items():
                yield converted.prefix(index) + name, tensor

    return _Rest(model, ((name, tensor.to(dtype)) for name, tensor in tensors()), layout.source)


def _stock(checkpoint: Checkpoint, dtype: torch.dtype) -> _Rest:
    folder = checkpoint.folder
    layout = Layout(checkpoint)
    model = model_on_meta(read_config(folder), folder, dtype)
    if (folder / GENERATION).is_file():
        model.generation_config = read_generation(folder)
    dtypes = loaded_dtypes(model, dtype)
    ours = {source: name for name, source in layout.names.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for source, tensor in checkpoint.items(list(ours)):
            check_finite([(source, tensor)], folder)
            yield ours[source], tensor.to(dtypes[ours[source]])

    return _Rest(model, tensors(), layout.source)


def _assign(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Put weights in their places, on a device, and all buffers there too; experts stay without memory."""
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors}, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    lost = [name for name, part in model.named_parameters() if part.is_meta and name.rpartition(".")[2] not in BANKS]
    if lost:
        raise InputError(f"nothing in the checkpoint is {lost[0]}, which the model needs; leave --expert-memory out")


def store_of(model: PreTrainedModel) -> ExpertStore | None:
    """Find a model's store; None if all its experts are in memory."""
    store = getattr(model, STORE, None)
    return store if isinstance(store, ExpertStore) else None


def report_of(model: PreTrainedModel) -> dict[str, float] | None:
    """Say what a model's store has done so far; None if it has none."""
    store = store_of(model)
    return None if store is None else store.report()
