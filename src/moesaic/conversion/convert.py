"""The pipeline: dense checkpoint, calibrate, partition, route, recover, checkpoint; one decoder layer at a time."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import yaml
from torch import Tensor

from .. import registry
from ..checkpoint.claim import check_apart
from ..checkpoint.facts import METRICS_FILE, copy_generation, copy_terms, origin
from ..checkpoint.single_file import MADE, ResumableFile, claim_file
from ..checkpoint.writer import CONFIG_FILE, ResumableOutput, claim_output
from ..config import ConvertConfig
from ..errors import WorkError
from ..evaluation.cost import at_experts_per_token, sizes
from ..evaluation.layerwise import layerwise_perplexity
from ..evaluation.perplexity import held_out_protocol
from ..files import read_json
from ..formats.base import Format
from ..formats.choose import engines_of
from ..formats.converted import Converted
from ..formats.engines import LLAMA_CPP
from ..formats.export import rewrite, write_embeddings_and_head, write_metrics
from ..formats.verify import check
from ..given import path
from ..machine import give_back_memory, machine, peak_rss_bytes, versions
from ..models.devices import begun_dtype, dtype_name
from ..models.families import empty
from ..models.integrity import check_numbers
from ..models.processor import copy_processor
from ..moe.modeling import MODEL_TYPE
from ..progress import Progress, unheard
from ..report.plots import write_plots
from ..results import ConversionResult, Json, LayerRecord, Trial
from .ahead import LookedAhead, look_ahead
from .answers import answers, compare_answers, is_text
from .auto import candidates, choose, write_text
from .dense_layers import keep_layer
from .engines import GGUF, for_output
from .gguf import write_checked_gguf
from .layer import convert_layer
from .prepare import Conversion, fingerprint
from .states import HiddenStates, embed, relearn_layer_calls
from .temperature import Temperature, fit


def convert(
    model: str | Path,
    output: str | Path,
    config: ConvertConfig | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    gguf: bool = True,
) -> ConversionResult:
    """Turn a dense model into a Mixture-of-Experts and write it to `output`.

    Args:
        model: hub id, folder, .gguf file or built-in name (`tiny`, `demo`, `demo-1.5b`, `gemma-270m`).
        output: the folder to make, or the `.gguf` file for llama.cpp; it appears only when whole.
        config: what to do; by default half of each FFN is active.
        resume: go on with an unfinished conversion of the same model, data and configuration.
        overwrite: replace `output` if it exists.
        force: keep a collapsed result.
        progress: called with (finished layers, all layers, note).
        gguf: whether a conversion for llama.cpp ends in a GGUF; not where it is trained first.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: a self-test failed or the result collapsed.
    """
    start = time.monotonic()
    output = path(output)
    check_apart(model, output)
    config, report = for_output(config or ConvertConfig(), output), progress or unheard
    one_file = output.suffix.lower() == GGUF
    with (claim_file if one_file else claim_output)(output, overwrite):
        write_text(str(model), config, report)
        conversions = candidates(str(model), config, begun_dtype(output) if resume else None)
        conversions[0].check_space(output)
        conversions[0].layerwise.check_finite()
        partial = (ResumableFile if one_file else ResumableOutput)(output, fingerprint(conversions), resume)
        records = [LayerRecord.from_dict(record, str(partial.folder)) for record in partial.layers]
        start -= sum(record.seconds for record in records)
        conversion, trials = choose(conversions, partial, report)
        ahead = look_ahead(conversion, partial, report)
        states = convert_layers(conversion, partial, records, report, ahead)
        temperature = fit(conversion, states)
        result = measure(conversion, output, records, states, temperature, trials, start)
        if ahead:
            result = replace(result, router=ahead.record())
        check_collapse(result, conversion.config, partial, force)
        write_rest(conversion, partial, result, temperature.tensors | (ahead.written(conversion) if ahead else {}))
        conversion.layerwise.drop_embeddings_and_head()  # the check needs the room
        del states
        give_back_memory()
        return finish(conversion, partial, result, report, gguf)


def convert_layers(
    conversion: Conversion,
    partial: ResumableOutput,
    records: list[LayerRecord],
    report: Progress,
    ahead: LookedAhead | None = None,
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
        relearn_layer_calls(layerwise, tokens)
    count = len(layerwise.layers)
    for index in range(len(records), count):
        report(index, count, f"layer error {records[-1].error:.3f}" if records else "")
        if index in conversion.layers:
            tensors, states, record = convert_layer(conversion, index, states, ahead)
        else:
            tensors, states, record = keep_layer(conversion, index, states)
        check_numbers(states.tensors(), f"layer {index}, hidden states", layerwise.dtype)
        tensors = conversion.format.layer_exactly(tensors, conversion.model_config)
        prefix = f"{layerwise.prefix}{index}."
        partial.add_layer(
            {prefix + name: tensor for name, tensor in tensors.items()}, states.tensors(), record.to_dict()
        )
        records.append(record)
    report(count, count, f"layer error {records[-1].error:.3f}")
    return states


def finish(
    conversion: Conversion, partial: ResumableOutput, result: ConversionResult, report: Progress, gguf: bool
) -> ConversionResult:
    """Check what was written, give it its name, and return what `metrics.json` says then.

    What fails as a stock architecture is written in moesaic's own format, unless it is for one engine.

    Raises:
        WorkError: it is in moesaic's own format already, or for an engine, and the check failed.
    """
    stock, engine = conversion.format.name != MODEL_TYPE, conversion.engine
    written: list[ConversionResult] = []

    def last(made: Path) -> None:
        found, done = check(Converted(made), made) if stock else None, result
        write_metrics(made, done.to_dict(), conversion.format, found)
        if gguf and engine and engine.engine == LLAMA_CPP:
            text_NL, device = conversion.tokens.held_out_NL[is_text(conversion)], conversion.layerwise.device
            called = partial.output if isinstance(partial, ResumableFile) else partial.output / MADE
            done = replace(done, gguf=write_checked_gguf(made, engine.outtype or "", called, text_NL, device, report))
            write_metrics(made, done.to_dict(), conversion.format, found)
        written.append(ConversionResult.from_dict(read_json(made / METRICS_FILE), str(made / METRICS_FILE)))

    try:
        partial.finish(last)
        return written[0]
    except WorkError as error:
        if not stock or engine:
            raise
        own: Format = registry.build("format", MODEL_TYPE)
        write_metrics(partial.folder, result.to_dict() | {"format_reason": str(error)}, own, None)
        inner = ResumableOutput(partial.output, conversion.fingerprint, resume=False, inner=True)
        rewrite(Converted(partial.folder), own, inner, result.output, unheard)
    file = partial.output / METRICS_FILE
    return ConversionResult.from_dict(read_json(file), str(file))


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
    dense, said = perplexity(conversion, states.dense), answers(conversion, states.dense)
    layerwise.model.load_state_dict(temperature.tensors, strict=False)
    converted, says = perplexity(conversion, states.converted), answers(conversion, states.converted)
    counted = sizes(empty(conversion.whole_config), plan, conversion.format)
    result = ConversionResult(
        output=str(output),
        format=conversion.format.name,
        format_reason=conversion.format_reason,
        partition=registry.text("partition", conversion.config.partition),
        plan=str(plan),
        expert_width=plan.width,
        ffn_active=counted.ffn_active,
        memory_factor=counted.memory_factor,
        total_parameters=counted.total_parameters,
        active_parameters=counted.active_parameters,
        dense_parameters=layerwise.num_parameters(),
        perplexity_dense=dense,
        perplexity=converted,
        perplexity_protocol=held_out_protocol(held_out_NL[is_text(conversion)]),
        peak_rss_bytes=peak_rss_bytes(),
        layers=layers,
        fingerprint=conversion.fingerprint,
        compute_dtype=dtype_name(layerwise.dtype),
        versions=versions(),
        machine=machine(),
        trials=trials,
        logit_factor=temperature.logit_factor,
        seconds=time.monotonic() - start,
        collapsed=False,
        engines=engines_of(conversion.format, conversion.whole_config),
        engine=conversion.engine,
        pictures=compare_answers(conversion, said, says) if said and says else None,
    )
    result = result.judged(conversion.config.collapse_ratio)
    if not registry.build("selection", conversion.model_config.selection).dynamic_top_k:
        return result
    loads = [sum(layers[index].expert_tokens) for index in conversion.layers]
    pictured = conversion.tokens.pictured.get("calibration")
    tokens = conversion.tokens.calibration_NL.numel() if pictured is None else int((~pictured.is_padding_NL).sum())
    chosen = statistics.fmean(loads) / tokens
    return at_experts_per_token(result, conversion.model_config, chosen)


def perplexity(conversion: Conversion, hidden_NLD: Tensor) -> float:
    """Compute `exp(mean loss)` of held-out text, pictures left out.

    Raises:
        WorkError: logits are NaN or infinite.
    """
    text_N = is_text(conversion)
    return layerwise_perplexity(conversion.layerwise, conversion.tokens.held_out_NL[text_N], hidden_NLD[text_N])


def check_collapse(result: ConversionResult, config: ConvertConfig, partial: ResumableOutput, force: bool) -> None:
    """Check that the converted model still has its language, and its eyes if it had any.

    Raises:
        WorkError: it has lost it, and `force` does not accept that.
    """
    if result.collapsed and not force:
        seen = f", of answers about pictures {result.pictures.perplexity:.4g}" if result.pictures else ""
        raise WorkError(
            f"the converted model collapsed: perplexity {result.perplexity:.4g}{seen}, {result.worst_ratio():.4g} "
            "times the dense model's. Give it more active neurons or use --recovery closed-form; "
            f"'{partial.folder}' is kept, and the same command with --force accepts the result"
        )


def write_rest(
    conversion: Conversion, partial: ResumableOutput, result: ConversionResult, others: dict[str, Tensor]
) -> None:
    """Write what is in OUT beside layers, metrics and card: other weights, configuration, tokenizer and plots.

    `others` are weights that are not the dense model's: a changed norm, a router ahead of the layers.
    """
    folder, layerwise = partial.folder, conversion.layerwise
    tensors = dict(layerwise.embeddings_and_head()) | others
    tensors = {name: tensor.to(conversion.dtype) for name, tensor in tensors.items()}
    write_embeddings_and_head(partial, conversion.format, conversion.whole_config, tensors)
    copy_generation(conversion.source, folder)
    conversion.tokenizer.save_pretrained(folder)
    if layerwise.takes_pictures:
        copy_processor(conversion.source, folder)
    copy_terms(conversion.source, folder)
    resolved: Json = {"config": conversion.config.model_dump(mode="json"), "model": conversion.model}
    resolved |= origin(conversion.model, conversion.source)
    resolved |= {"plan": str(conversion.plan), "fingerprint": conversion.fingerprint, "versions": result.versions}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(resolved, sort_keys=False))
    write_plots(result, folder)
