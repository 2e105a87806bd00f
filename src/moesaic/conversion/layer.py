"""One decoder layer of a conversion: calibrate, partition, route, recover, and a self-test on the way.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import CHUNK_TOKENS, LayerActivations
from ..calibration.layers import (
    AttentionTape,
    Tap,
    calibrate,
    expert_load,
    relative_error,
    replaced_ffn,
    residual_stream_error,
)
from ..calibration.sinks import opening_targets
from ..errors import WorkError
from ..machine import give_back_memory, peak_rss_bytes
from ..moe.block import MoE
from ..partition import Partition
from ..routing.base import unit_scores
from .prepare import Conversion

CONVERTED = {"converted", "validation", "first"}
"""States that see converted layers, beside the calibration tokens."""


LEAST_EPS = 1e-5
"""Of the self-test: a long float32 sum depends on its order by more than one rounding."""


class Laps:
    """Seconds between calls, and the process's peak memory so far at each, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes: dict[str, int] = {}
        self.last = time.monotonic()

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.last = round(now - self.last, 3), now
        self.peak_rss_bytes[name] = peak_rss_bytes()


def embed(conversion: Conversion) -> dict[str, Tensor]:
    """Hidden states that enter the first layer; held-out text and tokens that open one on the dense path too."""
    tokens = {
        "calibration": conversion.tokens_NL,
        "validation": conversion.validation_NL,
        "first": conversion.opening_N1,
    }
    tokens |= {"converted": conversion.held_out_NL}
    states = {name: conversion.stream.embed(tokens_NL) for name, tokens_NL in tokens.items() if len(tokens_NL)}
    dense = {"first": "dense_first", "converted": "dense"}
    return states | {dense[name]: hidden.clone() for name, hidden in states.items() if name in dense}


@torch.no_grad()
def convert_layer(
    conversion: Conversion, index: int, states: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Convert one decoder layer: its tensors by their names in it, the hidden states after it, and a record.

    Without the state `dense` the record does not say how far the residual stream has drifted.
    """
    laps = Laps()
    generator = torch.Generator().manual_seed(conversion.config.seed * 1_000_003 + index)
    with conversion.stream.layer(index) as layer:
        laps("load")
        unchanged = {name: conversion.stream.run(index, layer, states[name]) for name in states.keys() & {"dense"}}
        first = None
        if "first" in states:
            paths = states["first"], states["dense_first"]
            first, unchanged["dense_first"] = opening_targets(conversion.stream, index, layer, *paths)
        attention = AttentionTape(layer)
        with attention.recording():
            sample = calibrate(conversion.stream, index, layer, states["calibration"], conversion.domain_N, first)
        laps("calibrate")
        partition = conversion.partitioner.split(sample, conversion.plan, generator).to(conversion.stream.device)
        laps("partition")
        moe = build_moe(conversion, sample, partition)
        laps("route")
        self_test(moe, sample, partition, index)
        few = sample.subsample(CHUNK_TOKENS, generator)
        split_error = relative_error(few, moe(few.input_TD))
        laps("self_test")
        conversion.recovery.recover(moe, sample, partition)
        moe.to(conversion.dtype).to(conversion.stream.dtype)  # later layers see what is written
        laps("recover")
        tap = Tap(moe)
        with replaced_ffn(layer, tap), attention.playing():
            calibration_NLD = conversion.stream.run(index, layer, states["calibration"])
        error = relative_error(sample, torch.cat(tap.outputs))
        with replaced_ffn(layer, moe):
            after = {name: conversion.stream.run(index, layer, states[name]) for name in states.keys() & CONVERTED}
            tensors = {name: tensor.to("cpu", conversion.dtype) for name, tensor in layer.state_dict().items()}
    load_E = expert_load(moe, sample)
    rates = few.activation_rates()
    give_back_memory()
    laps("run_converted")
    record = {
        "layer": index,
        "split_error": split_error,
        "error": error,
        **(residual_stream_error(unchanged["dense"], after["converted"]) if "dense" in unchanged else {}),
        "expert_tokens": load_E.tolist(),
        "unreached_experts": (load_E == 0).nonzero().flatten().tolist(),
        "activation_rates": rates,
        "seconds": sum(laps.seconds.values()),
        "stage_seconds": laps.seconds,
        "stage_peak_rss_bytes": laps.peak_rss_bytes,
    }
    return tensors, unchanged | after | {"calibration": calibration_NLD}, record


def build_moe(conversion: Conversion, sample: LayerActivations, partition: Partition) -> MoE:
    """The MoE block with the dense weights cut by the partition and the router fitted."""
    act_fn = sample.ffn.act_fn
    assert isinstance(act_fn, nn.Module)
    moe = MoE(conversion.working, act_fn).to(conversion.stream.device, conversion.stream.dtype).requires_grad_(False)
    gate = (
        conversion.router.build(sample, partition, conversion.plan.num_experts_per_tok)
        if conversion.plan.num_experts
        else {}
    )
    if gate and conversion.router.gate == "linear":
        gate = unit_scores(gate, sample.input_TD)
    moe.load_dense(sample.ffn, partition.shared, partition.experts, gate, partition.bias_D)
    return moe


def self_test(moe: MoE, sample: LayerActivations, partition: Partition, index: int) -> None:
    """The dense FFN is understood, every expert is a copy of its neurons, and disjoint ones add up to the dense FFN.

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
    for name, neurons, (gate_ID, up_ID, down_DI) in moe.parts(partition.shared, partition.experts):
        copies = ((gate_ID, ffn.gate_FD[neurons]), (up_ID, ffn.up_FD[neurons]), (down_DI, ffn.down_DF[:, neurons]))
        if not all(torch.equal(ours, dense) for ours, dense in copies):
            raise WorkError(f"self-test failed in layer {index}: {name} is no copy of its neurons")
    # each block's output is rounded once before the sum
    if partition.is_disjoint(ffn.intermediate_size) and differs(
        moe.forward_all_experts(x_TD), 2 * eps * math.sqrt(1 + len(partition.experts))
    ):
        raise WorkError(f"self-test failed in layer {index}: all experts on are not the dense FFN")
