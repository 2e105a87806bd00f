"""The pipeline: dense checkpoint, calibrate, partition, route, recover, checkpoint; one decoder layer at a time.

Shapes: N sequences, L tokens in one, T = N L tokens, D hidden size, E routed experts.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from . import registry
from .calibration.text import bundled, text_hash
from .choice import Progress, candidates, choose
from .confidence import fit_confidence
from .config import ConvertConfig
from .errors import WorkError
from .evaluation.machine import give_back_memory, machine, peak_rss_bytes, versions
from .export.check import check
from .export.native import export, write_facts, write_outer
from .job import Job, fingerprint
from .layer import convert_layer, embed
from .models.converted import Converted
from .models.working import MODEL_TYPE
from .models.writer import MARK, ResumableOutput, check_output
from .shapes import sizes


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
    jobs = candidates(str(model), config or ConvertConfig())
    jobs[0].check_space(output)
    partial = ResumableOutput(output, fingerprint(jobs), resume)
    start -= sum(record["seconds"] for record in partial.layers)
    job, trials = choose(jobs, partial, progress)
    job.stream.load_outer()
    states = partial.hidden(job.stream.device, job.stream.dtype) or partial.start(embed(job))
    for tokens_NL in (job.held_out_NL[:1], job.first_N1[:1]):
        if len(tokens_NL):
            job.stream.embed(tokens_NL)  # a resumed run must know how to call layers on such lengths
    count = len(job.stream.layers)
    for index in range(len(partial.layers), count):
        if progress:
            progress(index, count, partial.layers[-1] if partial.layers else None)
        tensors, states, record = convert_layer(job, index, states)
        tensors = job.form.layer_exactly(tensors, job.working)
        prefix = f"{job.stream.prefix}{index}."
        partial.add_layer({prefix + name: tensor for name, tensor in tensors.items()}, states, record)
    if progress:
        progress(count, count, partial.layers[-1])
    factor, norm = confidence(job, states)
    metrics = measure(job, output, partial.layers, states, norm) | {"trials": trials, "logit_factor": factor}
    metrics["seconds"] = time.monotonic() - start
    check_collapse(metrics, job.config, partial, force)
    write_rest(job, partial, metrics, norm)
    job.stream.drop_outer()  # the check needs the room
    del states
    give_back_memory()
    return finish(job, partial, metrics)


def finish(job: Job, partial: ResumableOutput, metrics: dict[str, Any]) -> dict[str, Any]:
    """Check what was written, give it its name, and return its metrics; what fails as a native form is made working."""
    native = job.form.name != MODEL_TYPE

    def last(made: Path) -> None:
        write_facts(made, metrics, job.form, check(Converted(made), made) if native else {})

    try:
        partial.finish(last)
    except WorkError as error:
        if not native:
            raise
        failed = partial.output.with_name(f"{partial.output.name}.failed")
        shutil.rmtree(failed, ignore_errors=True)
        made = partial.folder.rename(failed)
        try:
            write_facts(made, metrics | {"format_reason": str(error)}, registry.build("export", MODEL_TYPE), {})
            export(made, metrics["output"], MODEL_TYPE, overwrite=True)
        except BaseException:  # the same command finds its layers again
            shutil.rmtree(partial.folder, ignore_errors=True)
            made.rename(partial.folder)
            raise
        shutil.rmtree(made)
    return json.loads((partial.output / "metrics.json").read_text())


def confidence(job: Job, states: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The factor of the logits and the tensors that carry it; 1 and none without recovery or validation tokens."""
    if job.config.recovery == "none" or "validation" not in states:
        return 1.0, {}
    return fit_confidence(job, states["validation"])


def measure(
    job: Job, output: Path, layers: list[dict[str, Any]], states: dict[str, Tensor], norm: dict[str, Tensor]
) -> dict[str, Any]:
    """The metrics of a finished conversion; perplexities are `exp(mean loss)` on bundled held-out text."""
    dense = perplexity(job, states["dense"])
    job.stream.model.load_state_dict(norm, strict=False)
    converted = perplexity(job, states["converted"])
    width = job.stream.config.intermediate_size
    return {
        "output": str(output),
        "format": job.form.name,
        "format_reason": job.form_reason,
        "partition": job.config.partition,
        "plan": str(job.plan),
        "expert_width": job.plan.width,
        "ffn_active": job.plan.ffn_active(width),
        **sizes(job.working, job.plan, job.form),
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
        "compute_dtype": str(job.stream.dtype).removeprefix("torch."),
        "versions": versions(),
        "machine": machine(),
    }


def perplexity(job: Job, hidden_NLD: Tensor) -> float:
    """`exp(mean loss)` of held-out text; NaN and what overflows become e^700, which JSON holds and is a collapse."""
    loss = job.stream.token_losses(job.held_out_NL, hidden_NLD).mean().double()
    return loss.nan_to_num(700).clamp(max=700).exp().item()


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


def write_rest(job: Job, partial: ResumableOutput, metrics: dict[str, Any], norm: dict[str, Tensor]) -> None:
    """What is in OUT beside layers, metrics and card: outer weights, configuration, tokenizer and plots."""
    folder, stream = partial.folder, job.stream
    job.working.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    outer = {n: t.to(job.dtype) for n, t in (dict(stream.outer_tensors()) | norm).items()}
    write_outer(partial, job.form, job.working, outer, fields)
    generation = job.source / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_text(generation.read_text())
    job.tokenizer.save_pretrained(folder)
    resolved = {"config": job.config.model_dump(mode="json"), "model": job.model, "plan": str(job.plan)}
    resolved |= {"fingerprint": job.fingerprint, "versions": metrics["versions"]}
    (folder / MARK).write_text(yaml.safe_dump(resolved, sort_keys=False))
    from .export.plots import write_plots  # matplotlib is slow to import

    write_plots(metrics, folder)
