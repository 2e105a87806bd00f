"""One decoder layer of a conversion: calibrate, partition, route, recover, and a self-test on the way.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.activations import CHUNK_TOKENS, LayerActivations
from ..calibration.layers import (
    AttentionTape,
    StreamError,
    Tap,
    calibrate,
    layer_generator,
    relative_error,
    replaced_ffn,
    residual_stream_error,
)
from ..calibration.sinks import OpeningTargets, opening_targets
from ..errors import WorkError
from ..machine import give_back_memory, peak_rss_bytes
from ..models.layerwise import LayerwiseModel
from ..models.pictured import Pictured
from ..moe.block import MoE
from ..partition import Partition
from ..results import LayerRecord
from ..routing.base import unit_scores
from .ahead import LookedAhead, following
from .modality import ByModality, by_modality, expert_loads
from .prepare import Conversion
from .states import TEXTS, HiddenStates

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
def convert_layer(
    conversion: Conversion, index: int, states: HiddenStates, ahead: LookedAhead | None = None
) -> ConvertedLayer:
    """Convert one decoder layer; without `states.dense` the record has no error of the residual stream.

    Args:
        conversion: what is converted, and how.
        index: the layer's number.
        states: what enters it.
        ahead: what was decided for the whole model, if anything was.

    Raises:
        WorkError: a self-test failed.
    """
    done, layerwise, pictured = StageTimer(), conversion.layerwise, conversion.tokens.pictured
    generator = layer_generator(conversion.config.seed, index)
    with layerwise.layer(index) as layer:
        done("load")
        dense = None if states.dense is None else layerwise.run(index, layer, states.dense, TEXTS["dense"])
        opening = fitted_to(conversion, index, layer, states)
        attention = AttentionTape(layer)
        with attention.recording():
            sample = calibrate(
                layerwise, index, layer, states.calibration, conversion.tokens.domain_N, opening,
                pictured.get("calibration"), conversion.config.image_weight,
            )  # fmt: skip
        sample = ahead.mark(sample, index) if ahead else sample
        done("calibrate")
        found = ahead.partitions[index] if ahead else conversion.partitioner.split(sample, conversion.plan, generator)
        partition = found.to(layerwise.device)
        done("partition")
        moe = build_moe(conversion, sample, partition)
        done("route")
        self_test(moe, sample, partition, index)
        few = sample.subsample(CHUNK_TOKENS, generator)
        with following(moe, few.chosen_TK):
            split_error = relative_error(few, moe(few.input_TD))
        done("self_test")
        with following(moe, sample.chosen_TK):
            conversion.recovery.recover(moe, sample, partition)
        moe.to(conversion.dtype).to(layerwise.dtype)  # later layers see what is written
        done("recover")
        tap = Tap(moe)
        with replaced_ffn(layer, tap), attention.playing(), following(moe, sample.chosen_TK):
            calibration_NLD = layerwise.run(index, layer, states.calibration, "calibration")
        output_TD = kept(torch.cat(tap.outputs), pictured.get("calibration"))
        error = relative_error(sample, output_TD)
        converted_NLD, apart = run_held_out(conversion, index, layer, states.converted, moe, sample, ahead)
        with replaced_ffn(layer, moe):
            after = replace(
                run_converted(layerwise, index, layer, states, moe, ahead),
                calibration=calibration_NLD, converted=converted_NLD, dense=dense,
                dense_opening=None if opening is None else opening.dense_after_M1D,
            )  # fmt: skip
            tensors = written_tensors(layer, moe, index == conversion.layers[0], conversion.dtype)
    loads_E, rates = expert_loads(moe, sample), few.activation_rates()
    give_back_memory()
    done("run_converted")
    record = layer_record(index, (split_error, error), stream_error(after, pictured), loads_E, rates, done)
    return ConvertedLayer(tensors, after, record if apart is None else replace(record, **apart._asdict()))


def kept(output_TD: Tensor, pictured: Pictured | None) -> Tensor:
    """Leave out the rows of padding."""
    return output_TD if pictured is None else output_TD[~pictured.is_padding_NL.flatten().to(output_TD.device)]


def layer_record(
    index: int, errors: tuple[float, float], stream: StreamError | None, loads_E: Tensor, rates: list[float],
    done: StageTimer,
) -> LayerRecord:  # fmt: skip
    """Say how the conversion of a layer went; `errors` are those of the FFN as cut and after recovery."""
    return LayerRecord(
        layer=index,
        split_error=errors[0],
        error=errors[1],
        residual_error=stream.residual_error if stream else None,
        sink_norm=stream.sink_norm if stream else None,
        expert_tokens=loads_E.tolist(),
        unreached_experts=(loads_E == 0).nonzero().flatten().tolist(),
        activation_rates=rates,
        seconds=sum(done.seconds.values()),
        stage_seconds=done.seconds,
        stage_peak_rss_bytes=done.peak_rss_bytes,
    )


def run_held_out(
    conversion: Conversion, index: int, layer: nn.Module, hidden_NLD: Tensor, moe: MoE, sample: LayerActivations,
    ahead: LookedAhead | None,
) -> tuple[Tensor, ByModality | None]:  # fmt: skip
    """Run a converted layer on held-out data, and see how it does on text and pictures apart if there are any."""
    pictured, tap = conversion.tokens.pictured.get("held_out"), Tap(moe)
    chosen_TK = ahead.of("converted", index) if ahead else None
    with replaced_ffn(layer, moe if pictured is None else tap), following(moe, chosen_TK):
        after_NLD = conversion.layerwise.run(index, layer, hidden_NLD, TEXTS["converted"])
    return after_NLD, None if pictured is None else by_modality(moe, sample, tap, pictured, chosen_TK)


def run_converted(
    layerwise: LayerwiseModel, index: int, layer: nn.Module, states: HiddenStates, moe: MoE, ahead: LookedAhead | None
) -> HiddenStates:
    """Run a converted layer on validation text and on what opens a text, by which it is not measured; others stay."""
    found = states.tensors()
    for text in ("validation", "opening"):
        if text in found:
            with following(moe, ahead.of(text, index) if ahead else None):
                found[text] = layerwise.run(index, layer, found[text], TEXTS[text])
    return HiddenStates.from_tensors(found)


def fitted_to(conversion: Conversion, index: int, layer: nn.Module, states: HiddenStates) -> OpeningTargets | None:
    """Find the targets of the tokens that open a text; None where there are none."""
    if states.opening is None or states.dense_opening is None:
        return None
    return opening_targets(conversion.layerwise, index, layer, states.opening, states.dense_opening)


def written_tensors(layer: nn.Module, moe: MoE, first: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Take a layer's tensors to the CPU, without those of its gate that the first converted one has for all."""
    elsewhere = moe.gate.first_layer_names if not first and moe.gate is not None else ()
    tensors = layer.state_dict().items()
    return {n: tensor.to("cpu", dtype) for n, tensor in tensors if not n.partition(".gate.")[2].startswith(elsewhere)}


def stream_error(states: HiddenStates, pictured: Mapping[str, Pictured]) -> StreamError | None:
    """Measure how far the residual stream is from the dense model's; None in a trial."""
    if states.dense is None:
        return None
    found = pictured.get("held_out")
    return residual_stream_error(states.dense, states.converted, None if found is None else found.is_padding_NL)


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
    """Test that the dense FFN is understood, experts are copies of its neurons, and together they are it.

    Disjoint ones add up to it; those that are all of it give it whichever run, as their weights say.

    Raises:
        WorkError: the formula `down(act(gate(x)) * up(x))` does not give the module's own output, a weight is not
            bit-equal, or all experts on, or copies of the whole, differ from dense by more than the dtype's rounding.
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
    if moe.gate is not None and moe.experts is not None and partition.is_whole(ffn.intermediate_size):
        total_T1 = moe.gate(x_TD, moe.experts).top_k_weights.float().sum(-1, keepdim=True)
        if differs(moe(x_TD).float() / total_T1, 2 * eps * math.sqrt(1 + moe.gate.num_experts_per_tok)):
            raise WorkError(f"self-test failed in layer {index}: copies of the dense FFN do not give its output")
