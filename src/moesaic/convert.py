"""The pipeline: dense checkpoint, calibrate, partition, route, recover, checkpoint; one decoder layer at a time.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn

from .calibration.layers import Tap, calibrate, expert_load, relative_error, replaced_ffn
from .calibration.sample import CHUNK_TOKENS, LayerSample
from .calibration.text import bundled, text_hash
from .config import ConvertConfig
from .errors import WorkError
from .evaluation.machine import machine, peak_rss_bytes, versions
from .export.card import write_card
from .job import Job, prepare
from .models.moe import MoE
from .models.writer import MARK, OUTER, ResumableOutput, check_output
from .partition import Partition

Progress = Callable[[int, int, dict[str, Any] | None], None]
"""Called with (finished layers, all layers, record of the last one)."""


def convert(
    model: str | Path,
    output: str | Path,
    config: ConvertConfig | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turn a dense model into a Mixture-of-Experts and write it to `output`.

    Args:
        model: hub id, folder, .gguf file or built-in name (`tiny`, `demo`, `demo-1.5b`, `gemma-270m`).
        output: the folder to make; it appears only when whole.
        config: what to do; by default half of each FFN is active.
        resume: go on with an unfinished conversion of the same model, data and configuration.
        overwrite: replace `output` if it exists.
        force: keep a collapsed result.
        progress: called after each layer.

    Returns:
        The metrics that `metrics.json` holds.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: a self-test failed or the result collapsed.
    """
    start = time.monotonic()
    output = Path(output)
    check_output(output, overwrite)
    job = prepare(model, config or ConvertConfig())
    job.check_space(output)
    partial = ResumableOutput(output, job.fingerprint, resume)
    start -= sum(record["seconds"] for record in partial.layers)
    job.stream.load_outer()
    states = partial.hidden(job.stream.device) or partial.start(embed(job))
    job.stream.embed(job.held_out_NL[:1])
    count = len(job.stream.layers)
    for index in range(len(partial.layers), count):
        if progress:
            progress(index, count, partial.layers[-1] if partial.layers else None)
        tensors, states, record = convert_layer(job, index, states)
        partial.add_layer(tensors, states, record)
    if progress:
        progress(count, count, partial.layers[-1])
    metrics = measure(job, output, partial.layers, states)
    metrics["seconds"] = time.monotonic() - start
    check_collapse(metrics, job.config, partial, force)
    write_rest(job, partial, metrics)
    partial.finish()
    return metrics


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


def embed(job: Job) -> dict[str, Tensor]:
    """Hidden states that enter the first layer: calibration, and held-out text on the dense and converted path."""
    held_out_NLD = job.stream.embed(job.held_out_NL)
    return {"calibration": job.stream.embed(job.tokens_NL), "dense": held_out_NLD, "converted": held_out_NLD.clone()}


@torch.no_grad()
def convert_layer(
    job: Job, index: int, states: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Convert one decoder layer: its tensors, the hidden states after it, and a record of what happened."""
    laps = Laps()
    generator = torch.Generator().manual_seed(job.config.seed * 1_000_003 + index)
    with job.stream.layer(index) as layer:
        laps("load")
        dense_NLD = job.stream.run(index, layer, states["dense"])
        sample = calibrate(job.stream, index, layer, states["calibration"])
        laps("calibrate")
        partition = job.partitioner.split(sample, job.plan, generator).to(job.stream.device)
        laps("partition")
        moe = build_moe(job, sample, partition)
        laps("route")
        self_test(moe, sample, partition, index)
        few = sample.subsample(CHUNK_TOKENS, generator)
        split_error = relative_error(few, moe(few.input_TD))
        laps("self_test")
        job.recovery.recover(moe, sample, partition)
        laps("recover")
        tap = Tap(moe)
        with replaced_ffn(layer, tap):
            calibration_NLD = job.stream.run(index, layer, states["calibration"])
        error = relative_error(sample, torch.cat(tap.outputs))
        with replaced_ffn(layer, moe):
            converted_NLD = job.stream.run(index, layer, states["converted"])
            prefix = f"{job.stream.prefix}{index}."
            tensors = {prefix + name: tensor.cpu() for name, tensor in layer.state_dict().items()}
    load_E = expert_load(moe, sample)
    rates = few.activation_rates()
    laps("run_converted")
    record = {
        "layer": index,
        "split_error": split_error,
        "error": error,
        "expert_tokens": load_E.tolist(),
        "unreached_experts": (load_E == 0).nonzero().flatten().tolist(),
        "activation_rates": rates,
        "seconds": sum(laps.seconds.values()),
        "stage_seconds": laps.seconds,
        "stage_peak_rss_bytes": laps.peak_rss_bytes,
    }
    return tensors, {"calibration": calibration_NLD, "dense": dense_NLD, "converted": converted_NLD}, record


def build_moe(job: Job, sample: LayerSample, partition: Partition) -> MoE:
    """The MoE block with the dense weights cut by the partition and the router fitted."""
    act_fn = sample.ffn.act_fn
    assert isinstance(act_fn, nn.Module)
    moe = MoE(job.working, act_fn).to(job.stream.device, job.stream.dtype).requires_grad_(False)
    gate = job.router.build(sample, partition, job.plan.active) if job.plan.num_experts else {}
    moe.fill(sample.ffn, partition.shared, partition.experts, gate, partition.bias_D)
    return moe


def self_test(moe: MoE, sample: LayerSample, partition: Partition, index: int) -> None:
    """The dense FFN is understood, every expert is a copy of its neurons, and disjoint ones add up to the dense FFN.

    Raises:
        WorkError: the formula `down(act(gate(x)) * up(x))` does not give the module's own output, a weight is not
            bit-equal, or all experts on differ from dense by more than the rounding of the dtype.
    """
    ffn, x_TD, dense_TD = sample.ffn, sample.input_TD[:64], sample.output_TD[:64].float()
    eps = torch.finfo(x_TD.dtype).eps

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
        moe.all_on(x_TD), 2 * eps * math.sqrt(1 + len(partition.experts))
    ):
        raise WorkError(f"self-test failed in layer {index}: all experts on are not the dense FFN")


def measure(job: Job, output: Path, layers: list[dict[str, Any]], states: dict[str, Tensor]) -> dict[str, Any]:
    """The metrics of a finished conversion; perplexities are `exp(mean loss)` on bundled held-out text."""
    # NaN and what overflows become e^700, which JSON can hold and which counts as a collapse
    dense, converted = (
        job.stream.token_losses(job.held_out_NL, states[name])
        .mean()
        .double()
        .nan_to_num(700)
        .clamp(max=700)
        .exp()
        .item()
        for name in ("dense", "converted")
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(job.working)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = routed * (1 - job.plan.active / job.plan.num_experts) if job.plan.num_experts else 0
    width = job.stream.config.intermediate_size
    return {
        "output": str(output),
        "format": "moesaic",
        "plan": str(job.plan),
        "expert_width": job.plan.width,
        "ffn_active": job.plan.ffn_active(width),
        "memory_factor": job.plan.memory_factor(width),
        "total_parameters": total,
        "active_parameters": round(total - idle),
        "dense_parameters": job.stream.parameters(),
        "perplexity_dense": dense,
        "perplexity": converted,
        "perplexity_protocol": {
            "text": "bundled held-out text, six domains",
            "tokens": job.held_out_NL.numel(),
            "window": job.held_out_NL.shape[1],
            "data_sha256": text_hash(bundled("heldout")),
        },
        "peak_rss_bytes": peak_rss_bytes(),
        "layers": layers,
        "fingerprint": job.fingerprint,
        "versions": versions(),
        "machine": machine(),
    }


def check_collapse(metrics: dict[str, Any], config: ConvertConfig, partial: ResumableOutput, force: bool) -> None:
    """Raises WorkError if the converted model has lost its language and `force` does not accept that."""
    ratio = metrics["perplexity"] / metrics["perplexity_dense"]
    metrics["collapsed"] = not ratio <= config.collapse_ratio
    if metrics["collapsed"] and not force:
        raise WorkError(
            f"the converted model collapsed: perplexity {metrics['perplexity']:.4g} is {ratio:.4g} times the dense "
            f"model's {metrics['perplexity_dense']:.4g}. Give it more active neurons or use --recovery closed-form; "
            f"'{partial.folder}' is kept, and the same command with --force accepts the result"
        )


def write_rest(job: Job, partial: ResumableOutput, metrics: dict[str, Any]) -> None:
    """Everything in OUT that is not a layer: outer weights, configuration, tokenizer, metrics, card and plots."""
    folder, stream = partial.folder, job.stream
    partial.write(OUTER, {n: t.to(stream.dtype) for n, t in stream.outer_tensors()})
    job.working.save_pretrained(folder)
    generation = job.source / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_text(generation.read_text())
    job.tokenizer.save_pretrained(folder)
    resolved = {"config": job.config.model_dump(mode="json"), "model": job.model, "plan": str(job.plan)}
    resolved |= {"fingerprint": job.fingerprint, "versions": metrics["versions"]}
    (folder / MARK).write_text(yaml.safe_dump(resolved, sort_keys=False))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    from .export.plots import write_plots  # matplotlib is slow to import

    write_plots(metrics, folder)
    write_card(metrics, resolved, folder)
