"""One decoder layer of a pruning: gather, select, cut, test, recover.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ..calibration.layers import layer_generator
from ..errors import WorkError
from ..machine import give_back_memory
from ..models.integrity import check_numbers
from ..models.layerwise import BATCH_TOKENS, LayerwiseModel
from ..models.moe_block import MoEBlock, Routing, find_block
from ..results import PrunedLayer
from .methods import Kept
from .prepare import Pruning
from .recover import best_block_ridge, recover
from .sample import BlockSample
from .sources import Axes, Tensors, expert_axes

TEST_TOKENS = 64
CALIBRATION = "calibration"
"""The name by which the model's layers know the calibration tokens, if they have pictures."""


@dataclass(frozen=True, kw_only=True)
class PruningStates:
    """What enters a decoder layer, [N, L, D] each."""

    calibration: Tensor
    """On the path of pruned layers."""
    pruned: Tensor
    """Held-out text on the path of pruned layers."""
    whole: Tensor
    """Held-out text on the source's own path."""

    def tensors(self) -> dict[str, Tensor]:
        """List them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def embed(cls, pruning: Pruning) -> Self:
        """Make what enters the first layer."""
        layerwise = pruning.source.layerwise
        held_out = layerwise.embed(pruning.held_out_NL)
        calibration = layerwise.embed(pruning.calibration_NL, pruning.pictured, CALIBRATION)
        return cls(calibration=calibration, pruned=held_out, whole=held_out.clone())


class Pruned(NamedTuple):
    """What the pruning of one decoder layer gives."""

    tensors: Tensors
    """By their name in the layer, on the CPU, in the dtype on disk."""
    states: PruningStates
    """After the layer."""
    record: PrunedLayer


@torch.no_grad()
def prune_layer(pruning: Pruning, index: int, states: PruningStates) -> Pruned:
    """Prune one decoder layer; one that is dense stays as it is.

    Raises:
        WorkError: a self-test failed, or something is NaN or infinite.
    """
    start, source = time.monotonic(), pruning.source
    layerwise, tensors = source.layerwise, source.read(index)
    generator = layer_generator(pruning.config.seed, index)
    made = pruning.layers[index]
    with layerwise.layer(index) as layer:
        whole = layerwise.run(index, layer, states.whole)
        block = find_block(layer, index)
        if block is None or pruning.keep == block.num_experts:
            after = run_both(layerwise, index, layer, states)
            kept = [] if block is None else list(range(block.num_experts))
            record = PrunedLayer(
                layer=index, kept=kept, expert_tokens_before=[], expert_tokens=[], split_error=0.0, error=0.0,
                seconds=time.monotonic() - start,
            )  # fmt: skip
            return Pruned(tensors, PruningStates(calibration=after[0], pruned=after[1], whole=whole), record)
        axes = expert_axes(layer, made)
        sample = gather(pruning, index, layer, block, states.calibration, axes)
        kept = pruning.pruner.select(sample, pruning.keep, generator)
        tensors = {name: t.index_select(axes[name], kept.experts) if name in axes else t for name, t in tensors.items()}
        fewer = load(made, tensors, layerwise, index)
        self_test(block, fewer, sample, kept, index)
        record = improve(pruning, fewer, sample, kept)
        record = replace(record, layer=index, seconds=time.monotonic() - start)
        prefix = f"{fewer.names['experts']}."
        for name in {"down_proj", *kept.changed} if pruning.config.recovery != "none" else kept.changed:
            own = fewer.experts.get_parameter(name).to("cpu", tensors[prefix + name].dtype)
            tensors[prefix + name] = own
            fewer.experts.get_parameter(name).copy_(own)  # later layers see what is written
    after = run_both(layerwise, index, made, states)
    made.to("meta")
    give_back_memory()
    found = PruningStates(calibration=after[0], pruned=after[1], whole=whole)
    check_numbers(found.tensors(), f"layer {index}, hidden states", layerwise.dtype)
    return Pruned(tensors, found, record)


def run_both(layerwise: LayerwiseModel, index: int, layer: nn.Module, states: PruningStates) -> list[Tensor]:
    """Run a layer on calibration and held-out tokens of the path of pruned layers."""
    texts = ((states.calibration, CALIBRATION), (states.pruned, ""))
    return [layerwise.run(index, layer, hidden_NLD, text) for hidden_NLD, text in texts]


def load(made: nn.Module, tensors: Tensors, layerwise: LayerwiseModel, index: int) -> MoEBlock:
    """Load a pruned layer's tensors, and find its Mixture of Experts."""
    ready = {name: tensor.to(layerwise.device, layerwise.dtype, copy=True) for name, tensor in tensors.items()}
    made.load_state_dict(ready, strict=False, assign=True)
    made.to(layerwise.device).requires_grad_(False)
    found = find_block(made, index)
    assert found is not None
    return found


def gather(
    pruning: Pruning, index: int, layer: nn.Module, block: MoEBlock, hidden_NLD: Tensor, axes: Axes
) -> BlockSample:
    """Run the layer with all its experts on the calibration tokens, and keep what enters them.

    Raises:
        WorkError: that is NaN or infinite.
    """
    seen: list[Tensor] = []
    handle = block.watch(lambda input_TD, _: seen.append(input_TD))
    try:
        pruning.source.layerwise.run(index, layer, hidden_NLD, CALIBRATION)
    finally:
        handle.remove()
    input_TD = torch.cat(seen)
    if pruning.pictured is not None:
        input_TD = input_TD[~pruning.pictured.is_padding_NL.flatten().to(input_TD.device)]
    check_numbers({"what enters the experts": input_TD}, f"layer {index}", pruning.source.layerwise.dtype)
    router = f"{block.names['router']}."
    own = {name.removeprefix(router): axis for name, axis in axes.items() if name.startswith(router)}
    return BlockSample(block, input_TD, own, pruning.source.groups)


def self_test(block: MoEBlock, fewer: MoEBlock, sample: BlockSample, kept: Kept, index: int) -> None:
    """Test that the block without the other experts is the source's with a router that cannot choose them.

    Raises:
        WorkError: outputs differ by more than the rounding of the dtype.
    """
    x_TD = sample.input_TD[:TEST_TOKENS]
    expected_TD = routed(block, sample.masked(kept.experts)(x_TD), x_TD)
    found_TD = routed(fewer, fewer.route(x_TD), x_TD)
    eps = max(torch.finfo(found_TD.dtype).eps, 1e-5)
    if not (found_TD - expected_TD).float().norm() <= 4 * eps * expected_TD.float().norm():
        raise WorkError(f"self-test failed in layer {index}: its experts do not say what they said in the source")


def routed(block: MoEBlock, routing: Routing, x_TD: Tensor) -> Tensor:
    """Compute what the routed experts say together, [T, D]."""
    index_TK, weight_TK = routing
    weight_TK = weight_TK.where(index_TK < block.num_experts, 0)
    index_TK = index_TK.clamp(max=block.num_experts - 1)
    parts = zip(x_TD.split(BATCH_TOKENS), index_TK.split(BATCH_TOKENS), weight_TK.split(BATCH_TOKENS), strict=True)
    return torch.cat([block.experts(x, index, weight.to(x.dtype)) for x, index, weight in parts])


def routed_now(block: MoEBlock, x_TD: Tensor) -> Tensor:
    """Compute what the routed experts that the block's router chooses say together, [T, D]."""
    return torch.cat([routed(block, block.route(x), x) for x in x_TD.split(BATCH_TOKENS)])


def improve(pruning: Pruning, fewer: MoEBlock, sample: BlockSample, kept: Kept) -> PrunedLayer:
    """Give the kept experts their changed weights, and recover; returns a record without number and time."""
    for name, value in kept.changed.items():
        parameter = fewer.experts.get_parameter(name)
        parameter.copy_(value.to(parameter.dtype))
    x_TD = sample.input_TD
    target_TD = routed_now(sample.block, x_TD)
    split_error = error = relative(target_TD, routed_now(fewer, x_TD))
    weight_TN = torch.cat([fewer.route(x).weights_of_all(fewer.num_experts) for x in x_TD.split(BATCH_TOKENS)])
    if pruning.config.recovery != "none":
        ridge = best_block_ridge(fewer, x_TD, target_TD, weight_TN)
        fewer.down_proj.copy_(recover(fewer, x_TD, target_TD, weight_TN, ridge).to(fewer.down_proj.dtype))
        error = relative(target_TD, routed_now(fewer, x_TD))
    return PrunedLayer(
        layer=0, kept=kept.experts.tolist(), expert_tokens_before=sample.expert_tokens().tolist(),
        expert_tokens=(weight_TN != 0).sum(0).tolist(), split_error=split_error, error=error, seconds=0.0,
    )  # fmt: skip


def relative(target_TD: Tensor, output_TD: Tensor) -> float:
    """Measure `mean_t ‖output_t - target_t‖ / ‖target_t‖`."""
    wrong_T = (output_TD.float() - target_TD.float()).norm(dim=1)
    return (wrong_T / target_TD.float().norm(dim=1).clamp(min=1e-30)).mean().item()
