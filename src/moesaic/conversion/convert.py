"""The pipeline: dense checkpoint, calibrate, partition, route, recover, checkpoint; one decoder layer at a time."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import yaml
from torch import Tensor

from .. import registry
from ..calibration.text import bundled, text_hash
from ..checkpoint.facts import copy_terms, origin
from ..checkpoint.writer import CONFIG_FILE, ResumableOutput, claim_output
from ..config import ConvertConfig
from ..errors import WorkError
from ..evaluation.cost import at_experts_per_token
from ..files import read_json
from ..formats.base import Format
from ..formats.converted import Converted
from ..formats.export import rewrite, write_embeddings_and_head, write_metrics
from ..formats.verify import check
from ..given import path
from ..machine import give_back_memory, machine, peak_rss_bytes, versions
from ..models.integrity import check_numbers
from ..moe.modeling import MODEL_TYPE
from ..report.plots import write_plots
from ..results import ConversionResult, Json, LayerRecord, PerplexityProtocol, Trial
from .auto import Progress, candidates, choose
from .layer import convert_layer
from .plans import sizes
from .prepare import Conversion, begun_dtype, fingerprint
from .states import HiddenStates, embed
from .temperature import Temperature, fit_temperature


def convert(
    model: str | Path,
    output: str | Path,
    config: ConvertConfig | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Turn a dense model into a Mixture-of-Experts and write it to `output`.

    Args:
        model: hub id, folder, .gguf file or built-in name (`tiny`, `demo`, `demo-1.5b`, `gemma-270m`).
        output: the folder to make; it appears only when whole.
        config: what to do; by default half of each FFN is active.
        resume: go on with an unfinished conversion of the same model, data and configuration.
        overwrite: replace `output` if it exists.
        force: keep a collapsed result.
        progress: called with (finished layers, all layers, note).

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: a self-test failed or the result collapsed.
    """
    start = time.monotonic()
    output = path(output)
    with claim_output(output, overwrite):
        conversions = candidates(str(model), config or ConvertConfig(), begun_dtype(output) if resume else None)
        conversions[0].check_space(output)
        conversions[0].layerwise.check_finite()
        partial = ResumableOutput(output, fingerprint(conversions), resume)
        records = [LayerRecord.from_dict(record, str(partial.folder)) for record in partial.layers]
        start -= sum(record.seconds for record in records)
        report = progress or (lambda done, count, note: None)
        conversion, trials = choose(conversions, partial, report)
        states = convert_layers(conversion, partial, records, report)
        temperature = fit(conversion, states)
        result = measure(conversion, output, records, states, temperature, trials, start)
        check_collapse(result, conversion.config, partial, force)
        write_rest(conversion, partial, result, temperature)
        conversion.layerwise.drop_embeddings_and_head()  # the check needs the room
        del states
        give_back_memory()
        return finish(conversion, partial, result)


def convert_layers(
    conversion: Conversion, partial: ResumableOutput, records: list[LayerRecord], report: Progress
) -> HiddenStates:
    """Convert the layers that are not finished, and add to `records`.

    Returns:
        What leaves the last layer.

    Raises:
        WorkError: a self-test failed, or the format does not hold a layer without loss.
        StorageError: the disk is full.
    """
    layerwise, tokens = conversion.layerwise, conversion.tokens
    layerwise.load_embeddings_and_head()
    found = partial.hidden(layerwise.device, layerwise.dtype)
    if found is None:
        states = embed(layerwise, tokens)
        partial.start(states.tensors())
    else:
        states = HiddenStates.from_tensors(found)
        for tokens_NL in (tokens.held_out_NL[:1], tokens.opening_M1[:1]):
            if len(tokens_NL):
                layerwise.embed(tokens_NL)  # so that it knows how to call layers on such lengths
    count = len(layerwise.layers)
    for index in range(len(records), count):
        report(index, count, f"layer error {records[-1].error:.3f}" if records else "")
        tensors, states, record = convert_layer(conversion, index, states)
        check_numbers(states.tensors(), f"layer {index}, hidden states", layerwise.dtype)
        tensors = conversion.format.layer_exactly(tensors, conversion.model_config)
        prefix = f"{layerwise.prefix}{index}."
        partial.add_layer(
            {prefix + name: tensor for name, tensor in tensors.items()}, states.tensors(), record.to_dict()
        )
        records.append(record)
    report(count, count, f"layer error {records[-1].error:.3f}")
    return states


def finish(conversion: Conversion, partial: ResumableOutput, result: ConversionResult) -> ConversionResult:
    """Check what was written, give it its name, and return what `metrics.json` says then.

    What fails as a stock architecture is written in moesaic's own format.

    Raises:
        WorkError: it is in moesaic's own format already, and the check failed.
    """
    stock = conversion.format.name != MODEL_TYPE

    def last(made: Path) -> None:
        write_metrics(made, result.to_dict(), conversion.format, check(Converted(made), made) if stock else None)

    try:
        partial.finish(last)
    except WorkError as error:
        if not stock:
            raise
        own: Format = registry.build("format", MODEL_TYPE)
        write_metrics(partial.folder, result.to_dict() | {"format_reason": str(error)}, own, None)
        inner = ResumableOutput(partial.output, conversion.fingerprint, resume=False, inner=True)
        rewrite(Converted(partial.folder), own, inner, result.output, lambda done, count, note: None)
    file = partial.output / "metrics.json"
    return ConversionResult.from_dict(read_json(file), str(file))


def fit(conversion: Conversion, states: HiddenStates) -> Temperature:
    """Fit the temperature on validation tokens; 1 without recovery or validation tokens."""
    if registry.text("recovery", conversion.config.recovery) == "none" or states.validation is None:
        return Temperature(1.0, {})
    return fit_temperature(conversion.layerwise, conversion.tokens.validation_NL, states.validation)


def measure(
    conversion: Conversion,
    output: Path,
    layers: list[LayerRecord],
    states: HiddenStates,
    temperature: Temperature,
    trials: list[Trial],
    start: float,
) -> ConversionResult:
    """Measure a finished conversion; perplexities are `exp(mean loss)` on bundled held-out text."""
    layerwise, plan, held_out_NL = conversion.layerwise, conversion.plan, conversion.tokens.held_out_NL
    assert states.dense is not None
    dense = perplexity(conversion, states.dense)
    layerwise.model.load_state_dict(temperature.tensors, strict=False)
    converted = perplexity(conversion, states.converted)
    counted = sizes(conversion.model_config, plan, conversion.format)
    result = ConversionResult(
        output=str(output),
        format=conversion.format.name,
        format_reason=conversion.format_reason,
        partition=registry.text("partition", conversion.config.partition),
        plan=str(plan),
        expert_width=plan.width,
        ffn_active=plan.ffn_active(layerwise.config.intermediate_size),
        memory_factor=counted.memory_factor,
        total_parameters=counted.total_parameters,
        active_parameters=counted.active_parameters,
        dense_parameters=layerwise.parameters(),
        perplexity_dense=dense,
        perplexity=converted,
        perplexity_protocol=PerplexityProtocol(
            text="bundled held-out text, six domains",
            tokens=held_out_NL.numel(),
            window=held_out_NL.shape[1],
            data_sha256=text_hash(bundled("heldout")),
        ),
        peak_rss_bytes=peak_rss_bytes(),
        layers=layers,
        fingerprint=conversion.fingerprint,
        compute_dtype=str(layerwise.dtype).removeprefix("torch."),
        versions=versions(),
        machine=machine(),
        trials=trials,
        logit_factor=temperature.logit_factor,
        seconds=time.monotonic() - start,
        collapsed=not converted / dense <= conversion.config.collapse_ratio,
        engines=conversion.format.engines(conversion.model_config),
    )
    if not registry.build("selection", conversion.model_config.selection).dynamic_top_k:
        return result
    chosen = statistics.fmean(sum(record.expert_tokens) for record in layers) / conversion.tokens.calibration_NL.numel()
    return at_experts_per_token(result, conversion.model_config, chosen)


def perplexity(conversion: Conversion, hidden_NLD: Tensor) -> float:
    """Compute `exp(mean loss)` of held-out text; what no number can hold becomes e^700, which is a collapse.

    Raises:
        WorkError: logits are NaN or infinite.
    """
    loss = conversion.layerwise.token_losses(conversion.tokens.held_out_NL, hidden_NLD).mean().double()
    check_numbers({"the logits of held-out text": loss}, "after the last layer", conversion.layerwise.dtype)
    return loss.clamp(max=700).exp().item()


def check_collapse(result: ConversionResult, config: ConvertConfig, partial: ResumableOutput, force: bool) -> None:
    """Check that the converted model still has its language.

    Raises:
        WorkError: it has lost it, and `force` does not accept that.
    """
    ratio = result.perplexity / result.perplexity_dense
    if result.collapsed and not force:
        raise WorkError(
            f"the converted model collapsed: perplexity {result.perplexity:.4g} is {ratio:.4g} times the dense "
            f"model's {result.perplexity_dense:.4g}. Give it more active neurons or use --recovery closed-form; "
            f"'{partial.folder}' is kept, and the same command with --force accepts the result"
        )


def write_rest(
    conversion: Conversion, partial: ResumableOutput, result: ConversionResult, temperature: Temperature
) -> None:
    """Write what is in OUT beside layers, metrics and card: other weights, configuration, tokenizer and plots."""
    folder, layerwise = partial.folder, conversion.layerwise
    tensors = dict(layerwise.embeddings_and_head()) | temperature.tensors
    tensors = {name: tensor.to(conversion.dtype) for name, tensor in tensors.items()}
    write_embeddings_and_head(partial, conversion.format, conversion.model_config, tensors)
    generation = conversion.source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    conversion.tokenizer.save_pretrained(folder)
    copy_terms(conversion.source, folder)
    resolved: Json = {"config": conversion.config.model_dump(mode="json"), "model": conversion.model}
    resolved |= origin(conversion.model, conversion.source)
    resolved |= {"plan": str(conversion.plan), "fingerprint": conversion.fingerprint, "versions": result.versions}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(resolved, sort_keys=False))
    write_plots(result.to_dict(), folder)
