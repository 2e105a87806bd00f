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

from .. import registry
from ..calibration.text import bundled, text_hash
from ..checkpoint.writer import CONFIG_FILE, ResumableOutput, check_output
from ..config import ConvertConfig
from ..errors import WorkError
from ..formats.converted import Converted
from ..formats.export import export, write_embeddings_and_head, write_facts
from ..formats.verify import check
from ..machine import give_back_memory, machine, peak_rss_bytes, versions
from ..moe.modeling import MODEL_TYPE
from .auto import Progress, candidates, choose
from .layer import convert_layer, embed
from .plans import sizes
from .prepare import Conversion, fingerprint
from .temperature import fit_temperature


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
    conversions = candidates(str(model), config or ConvertConfig())
    conversions[0].check_space(output)
    partial = ResumableOutput(output, fingerprint(conversions), resume)
    start -= sum(record["seconds"] for record in partial.layers)
    conversion, trials = choose(conversions, partial, progress)
    conversion.stream.load_embeddings_and_head()
    states = partial.hidden(conversion.stream.device, conversion.stream.dtype) or partial.start(embed(conversion))
    for tokens_NL in (conversion.held_out_NL[:1], conversion.opening_N1[:1]):
        if len(tokens_NL):
            conversion.stream.embed(tokens_NL)  # a resumed run must know how to call layers on such lengths
    count = len(conversion.stream.layers)
    for index in range(len(partial.layers), count):
        if progress:
            progress(index, count, partial.layers[-1] if partial.layers else None)
        tensors, states, record = convert_layer(conversion, index, states)
        tensors = conversion.format.layer_exactly(tensors, conversion.working)
        prefix = f"{conversion.stream.prefix}{index}."
        partial.add_layer({prefix + name: tensor for name, tensor in tensors.items()}, states, record)
    if progress:
        progress(count, count, partial.layers[-1])
    factor, norm = confidence(conversion, states)
    metrics = measure(conversion, output, partial.layers, states, norm) | {"trials": trials, "logit_factor": factor}
    metrics["seconds"] = time.monotonic() - start
    check_collapse(metrics, conversion.config, partial, force)
    write_rest(conversion, partial, metrics, norm)
    conversion.stream.drop_embeddings_and_head()  # the check needs the room
    del states
    give_back_memory()
    return finish(conversion, partial, metrics)


def finish(conversion: Conversion, partial: ResumableOutput, metrics: dict[str, Any]) -> dict[str, Any]:
    """Check what was written, give it its name, and return its metrics; what fails as a native form is made working."""
    native = conversion.format.name != MODEL_TYPE

    def last(made: Path) -> None:
        write_facts(made, metrics, conversion.format, check(Converted(made), made) if native else {})

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


def confidence(conversion: Conversion, states: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The factor of the logits and the tensors that carry it; 1 and none without recovery or validation tokens."""
    if conversion.config.recovery == "none" or "validation" not in states:
        return 1.0, {}
    return fit_temperature(conversion, states["validation"])


def measure(
    conversion: Conversion,
    output: Path,
    layers: list[dict[str, Any]],
    states: dict[str, Tensor],
    norm: dict[str, Tensor],
) -> dict[str, Any]:
    """The metrics of a finished conversion; perplexities are `exp(mean loss)` on bundled held-out text."""
    dense = perplexity(conversion, states["dense"])
    conversion.stream.model.load_state_dict(norm, strict=False)
    converted = perplexity(conversion, states["converted"])
    width = conversion.stream.config.intermediate_size
    return {
        "output": str(output),
        "format": conversion.format.name,
        "format_reason": conversion.format_reason,
        "partition": conversion.config.partition,
        "plan": str(conversion.plan),
        "expert_width": conversion.plan.width,
        "ffn_active": conversion.plan.ffn_active(width),
        **sizes(conversion.working, conversion.plan, conversion.format),
        "dense_parameters": conversion.stream.parameters(),
        "perplexity_dense": dense,
        "perplexity": converted,
        "perplexity_protocol": {
            "text": "bundled held-out text, six domains",
            "tokens": conversion.held_out_NL.numel(),
            "window": conversion.held_out_NL.shape[1],
            "data_sha256": text_hash(bundled("heldout")),
        },
        "peak_rss_bytes": peak_rss_bytes(),
        "layers": layers,
        "fingerprint": conversion.fingerprint,
        "compute_dtype": str(conversion.stream.dtype).removeprefix("torch."),
        "versions": versions(),
        "machine": machine(),
    }


def perplexity(conversion: Conversion, hidden_NLD: Tensor) -> float:
    """`exp(mean loss)` of held-out text; NaN and what overflows become e^700, which JSON holds and is a collapse."""
    loss = conversion.stream.token_losses(conversion.held_out_NL, hidden_NLD).mean().double()
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


def write_rest(
    conversion: Conversion, partial: ResumableOutput, metrics: dict[str, Any], norm: dict[str, Tensor]
) -> None:
    """What is in OUT beside layers, metrics and card: outer weights, configuration, tokenizer and plots."""
    folder, stream = partial.folder, conversion.stream
    conversion.working.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    outer = {n: t.to(conversion.dtype) for n, t in (dict(stream.embeddings_and_head()) | norm).items()}
    write_embeddings_and_head(partial, conversion.format, conversion.working, outer, fields)
    generation = conversion.source / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_text(generation.read_text())
    conversion.tokenizer.save_pretrained(folder)
    resolved = {
        "config": conversion.config.model_dump(mode="json"),
        "model": conversion.model,
        "plan": str(conversion.plan),
    }
    resolved |= {"fingerprint": conversion.fingerprint, "versions": metrics["versions"]}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(resolved, sort_keys=False))
    from ..report.plots import write_plots  # matplotlib is slow to import

    write_plots(metrics, folder)
