"""One decoder layer of a conversion: calibrate, partition, route, recover, and a self-test on the way.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.activations import CHUNK_TOKENS, LayerActivations
from ..calibration.layers import (
    AttentionTape,
    Tap,
    calibrate,
    relative_error,
    replaced_ffn,
    residual_stream_error,
)
from ..calibration.sinks import OpeningTargets, opening_targets
from ..errors import WorkError
from ..machine import give_back_memory, peak_rss_bytes
from ..moe.block import MoE
from ..partition import Partition
from ..results import LayerRecord
from ..routing.base import unit_scores
from .prepare import Conversion
from .states import HiddenStates

LEAST_EPS = 1e-5
"""Of the self-test: a long float32 sum depends on its order by more than one rounding."""


class ConvertedLayer(NamedTuple):
    """What the conversion of one decoder layer gives."""

    tensors: dict[str, Tensor]
    """By their name in the layer, on the CPU, in the dtype that is written."""
    states: HiddenStates
    """After the layer."""
    record: LayerRecord


class StageTimer:
    """Seconds between calls, and the process's peak memory so far at each, by the stage's name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes: dict[str, int] = {}
        self.last = time.monotonic()

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self.last = round(now - self.last, 3), now
        self.peak_rss_bytes[stage] = peak_rss_bytes()


@torch.no_grad()
def convert_layer(conversion: Conversion, index: int, states: HiddenStates) -> ConvertedLayer:
    """Convert one decoder layer; without `states.dense` the record has no error of the residual stream.

    Raises:
        WorkError: a self-test failed.
    """
    done, layerwise = StageTimer(), conversion.layerwise
    generator = torch.Generator().manual_seed(conversion.config.seed * 1_000_003 + index)
    with layerwise.layer(index) as layer:
        done("load")
        dense = None if states.dense is None else layerwise.run(index, layer, states.dense)
        opening: OpeningTargets | None = None
        if states.opening is not None and states.dense_opening is not None:
            opening = opening_targets(layerwise, index, layer, states.opening, states.dense_opening)
        attention = AttentionTape(layer)
        with attention.recording():
            sample = calibrate(layerwise, index, layer, states.calibration, conversion.tokens.domain_N, opening)
        done("calibrate")
        partition = conversion.partitioner.split(sample, conversion.plan, generator).to(layerwise.device)
        done("partition")
        moe = build_moe(conversion, sample, partition)
        done("route")
        self_test(moe, sample, partition, index)
        few = sample.subsample(CHUNK_TOKENS, generator)
        split_error = relative_error(few, moe(few.input_TD))
        done("self_test")
        conversion.recovery.recover(moe, sample, partition)
        moe.to(conversion.dtype).to(layerwise.dtype)  # later layers see what is written
        done("recover")
        tap = Tap(moe)
        with replaced_ffn(layer, tap), attention.playing():
            calibration_NLD = layerwise.run(index, layer, states.calibration)
        error = relative_error(sample, torch.cat(tap.outputs))
        with replaced_ffn(layer, moe):
            after = HiddenStates(
                calibration=calibration_NLD,
                converted=layerwise.run(index, layer, states.converted),
                dense=dense,
                validation=None if states.validation is None else layerwise.run(index, layer, states.validation),
                opening=None if states.opening is None else layerwise.run(index, layer, states.opening),
                dense_opening=None if opening is None else opening.dense_after_M1D,
            )
            tensors = written_tensors(layer, moe, index, conversion.dtype)
    load_E = expert_load(moe, sample)
    rates = few.activation_rates()
    give_back_memory()
    done("run_converted")
    record = LayerRecord(
        layer=index,
        split_error=split_error,
        error=error,
        **residual_error_fields(after),
        expert_tokens=load_E.tolist(),
        unreached_experts=(load_E == 0).nonzero().flatten().tolist(),
        activation_rates=rates,
        seconds=sum(done.seconds.values()),
        stage_seconds=done.seconds,
        stage_peak_rss_bytes=done.peak_rss_bytes,
    )
    return ConvertedLayer(tensors, after, record)


def written_tensors(layer: nn.Module, moe: MoE, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Take a layer's tensors to the CPU, without those of its gate that the first layer has for all."""
    elsewhere = moe.gate.first_layer_names if index and moe.gate is not None else ()
    tensors = layer.state_dict().items()
    return {n: tensor.to("cpu", dtype) for n, tensor in tensors if not n.partition(".gate.")[2].startswith(elsewhere)}


def residual_error_fields(states: HiddenStates) -> dict[str, float | None]:
    """Measure how far the residual stream is from the dense model's, as fields of the record; nothing in a trial."""
    if states.dense is None:
        return {}
    return residual_stream_error(states.dense, states.converted)._asdict()


def build_moe(conversion: Conversion, sample: LayerActivations, partition: Partition) -> MoE:
    """Make the MoE block: the dense weights cut by the partition, and the router fitted."""
    act_fn, plan, layerwise = sample.ffn.act_fn, conversion.plan, conversion.layerwise
    assert isinstance(act_fn, nn.Module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(conversion.config.seed)  # of what no router fits, such as a GRU
        moe = MoE(conversion.model_config, act_fn)
    moe = moe.to(layerwise.device, layerwise.dtype).requires_grad_(False)
    gate = conversion.router.fit(sample, partition, plan.num_experts_per_tok) if plan.num_experts else {}
    if gate and conversion.router.gate_name == "linear":
        gate = unit_scores(gate, sample.input_TD)
    moe.load_dense(sample.ffn, partition.shared, partition.experts, gate, partition.bias_D)
    return moe


def self_test(moe: MoE, sample: LayerActivations, partition: Partition, index: int) -> None:
    """Test that the dense FFN is understood, experts are copies of its neurons, and disjoint ones add up to it.

    Raises:
        WorkError: the formula `down(act(gate(x)) * up(x))` does not give the module's own output, a weight is not
            bit-equal, or all experts on differ from dense by more than the rounding of the dtype.
    """
    ffn, x_TD, dense_TD = sample.ffn, sample.input_TD[:64], sample.output_TD[:64].float()
    eps = max(torch.finfo(x_TD.dtype).eps, LEAST_EPS)

    def differs(output_TD: Tensor, bound: float) -> bool:
        return not (output_TD.float() - dense_TD).norm() <= bound * dense_TD.norm()

    if differs(ffn(x_TD), 2 * eps):
        raise WorkError(f"self-test failed in layer {index}: its FFN is more than down(act(gate(x)) * up(x))")
    for e in moe.parts(partition.shared, partition.experts):
        dense = ffn.take(e.neurons)
        copies = ((e.gate_ID, dense.gate_FD), (e.up_ID, dense.up_FD), (e.down_DI, dense.down_DF))
        if not all(torch.equal(ours, theirs) for ours, theirs in copies):
            raise WorkError(f"self-test failed in layer {index}: {e.name} is no copy of its neurons")
    # each block's output is rounded once before the sum
    if partition.is_disjoint(ffn.intermediate_size) and differs(
        moe.forward_all_experts(x_TD), 2 * eps * math.sqrt(1 + len(partition.experts))
    ):
        raise WorkError(f"self-test failed in layer {index}: all experts on are not the dense FFN")


@torch.no_grad()
def expert_load(moe: MoE, sample: LayerActivations) -> Tensor:
    """Count the sample's tokens that run each routed expert, int64 [E]."""
    if moe.gate is None or moe.experts is None:
        return torch.zeros(0, dtype=torch.int64)
    count = moe.experts.num_experts
    chosen = [moe.gate(x_CD, moe.experts).top_k_index for x_CD in sample.input_TD.split(CHUNK_TOKENS)]
    return torch.bincount(torch.cat(chosen).flatten().cpu(), minlength=count + 1)[:count]
