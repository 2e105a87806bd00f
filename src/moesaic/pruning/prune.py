"""The pipeline: Mixture of Experts, calibrate, choose, cut, recover, checkpoint; one decoder layer at a time."""

from __future__ import annotations

import time
from pathlib import Path

from .. import registry
from ..checkpoint.claim import check_apart
from ..checkpoint.facts import copy_terms, origin
from ..checkpoint.writer import ResumableOutput, claim_output
from ..config import PruneConfig
from ..evaluation.layerwise import layerwise_perplexity
from ..evaluation.perplexity import held_out_protocol
from ..files import write_json
from ..given import path
from ..machine import give_back_memory, machine, peak_rss_bytes, versions
from ..models.devices import begun_dtype, dtype_name
from ..models.processor import copy_processor
from ..progress import Progress, unheard
from ..results import DepthResult, Json, PrunedLayer, PruningResult
from .depth.prune import prune_depth
from .finish import RESULT_FILE, check_collapse, finish_converted, finish_stock, parameters, stock_error
from .layer import PruningStates, prune_layer
from .methods import LayerPruner
from .prepare import Pruning, check_room, prepare
from .sources import ConvertedSource


def prune(
    model: str | Path,
    output: str | Path,
    config: PruneConfig | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> PruningResult | DepthResult:
    """Leave out experts of a Mixture of Experts, or layers of any model, and write the rest in the source's format.

    Args:
        model: hub id, folder, .gguf file or built-in name: of a stock architecture, or (experts) converted by moesaic.
        output: the folder to make; it appears only when whole.
        config: what to do; by default a quarter of the experts goes. Method `depth` leaves out layers.
        resume: go on with an unfinished pruning of the same model, data and configuration.
        overwrite: replace `output` if it exists.
        force: keep a collapsed result.
        progress: called with (finished layers, all layers, note).

    Returns:
        What `pruning.json` in the output holds: of layers a `DepthResult`.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: a self-test failed or the result collapsed.
    """
    start = time.monotonic()
    output, config = path(output), config or PruneConfig(ratio=0.25)
    check_apart(model, output)
    report = progress or unheard
    with claim_output(output, overwrite):
        if isinstance(registry.build("pruning", config.method), LayerPruner):
            return prune_depth(str(model), output, config, resume=resume, force=force, progress=report)
        pruning = prepare(str(model), config, begun_dtype(output) if resume else None)
        check_room(output, pruning.source.layerwise, pruning.calibration_NL.numel() + 2 * pruning.held_out_NL.numel())
        pruning.source.layerwise.check_finite()
        partial = ResumableOutput(output, pruning.fingerprint, resume)
        records = [PrunedLayer.from_dict(record, str(partial.folder)) for record in partial.layers]
        start -= sum(record.seconds for record in records)
        states = prune_layers(pruning, partial, records, report)
        notes = write_rest(pruning, partial)
        result = measure(pruning, output, records, states, notes, start)
        check_collapse(result, f"more experts than {result.num_experts}, or try another --method", partial, force)
        return finish(pruning, partial, result, states)


def prune_layers(
    pruning: Pruning, partial: ResumableOutput, records: list[PrunedLayer], report: Progress
) -> PruningStates:
    """Prune the layers that are not finished, and add to `records`.

    Returns:
        What leaves the last layer.

    Raises:
        WorkError: a self-test failed.
        StorageError: the disk is full.
    """
    layerwise, keep = pruning.source.layerwise, pruning.keep
    layerwise.load_embeddings_and_head()
    found = partial.hidden(layerwise.device, layerwise.dtype)
    if found is None:
        states = PruningStates.embed(pruning)
        partial.start(states.tensors())
    else:
        states = PruningStates(**found)
        PruningStates.embed(pruning)  # so that it knows how to call layers on them
    count = len(layerwise.layers)
    for index in range(len(records), count):
        report(index, count, f"expert error {records[-1].error:.3f}" if records else "")
        tensors, states, record = prune_layer(pruning, index, states)
        partial.add_layer(pruning.source.on_disk(index, tensors, keep), states.tensors(), record.to_dict())
        records.append(record)
    report(count, count, "checking")
    return states


def write_rest(pruning: Pruning, partial: ResumableOutput) -> list[str]:
    """Write what is in OUT beside layers and results; returns what people should know of it."""
    notes = pruning.source.write_rest(partial, pruning.keep)
    pruning.tokenizer.save_pretrained(partial.folder)
    if pruning.source.layerwise.takes_pictures:
        copy_processor(pruning.folder, partial.folder)
    copy_terms(pruning.folder, partial.folder)
    return notes


def measure(
    pruning: Pruning, output: Path, layers: list[PrunedLayer], states: PruningStates, notes: list[str], start: float
) -> PruningResult:
    """Measure a finished pruning; perplexities are `exp(mean loss)` on bundled held-out text."""
    source, config, held_out_NL = pruning.source, pruning.config, pruning.held_out_NL
    before, after = (
        layerwise_perplexity(source.layerwise, held_out_NL, hidden) for hidden in (states.whole, states.pruned)
    )
    return PruningResult(
        output=str(output),
        model=pruning.model,
        architecture=source.checkpoint.architecture(),
        method=registry.text("pruning", config.method),
        recovery=config.recovery,
        num_experts_before=source.block.num_experts,
        num_experts=pruning.keep,
        num_experts_per_tok=source.block.num_experts_per_tok,
        total_parameters_before=source.layerwise.num_parameters(),
        total_parameters=parameters(source.pruned_model(pruning.keep)),
        perplexity_before=before,
        perplexity=after,
        perplexity_protocol=held_out_protocol(held_out_NL),
        layers=layers,
        max_abs_logit_error=None,
        notes=notes,
        collapsed=not after / before <= config.collapse_ratio,
        seed=config.seed,
        fingerprint=pruning.fingerprint,
        compute_dtype=dtype_name(source.layerwise.dtype),
        versions=versions(),
        machine=machine(),
        peak_rss_bytes=peak_rss_bytes(),
        seconds=time.monotonic() - start,
    )


def finish(pruning: Pruning, partial: ResumableOutput, result: PruningResult, states: PruningStates) -> PruningResult:
    """Check what was written as transformers loads it, give it its name, and return what `pruning.json` says then.

    Raises:
        WorkError: it does not say what the run layer by layer said.
    """
    layerwise, tokens_1L = pruning.source.layerwise, pruning.held_out_NL[:1]
    expected_LV = layerwise.logits(tokens_1L, states.pruned[:1]).float().cpu()
    layerwise.drop_embeddings_and_head()  # the check needs the room
    give_back_memory()
    settings: Json = {"pruning": pruning.config.model_dump(mode="json"), "model": pruning.model, "config": {}}
    settings |= origin(pruning.model, pruning.folder) | {"fingerprint": pruning.fingerprint, "versions": versions()}
    found: list[PruningResult] = []

    def last(made: Path) -> None:
        if isinstance(pruning.source, ConvertedSource):
            finish_converted(pruning.source, pruning.folder, made, settings, result)
        else:
            finish_stock(made, settings, result, pictures=layerwise.takes_pictures)
        error = stock_error(made, layerwise, tokens_1L, expected_LV)
        found.append(PruningResult.from_dict(result.to_dict() | {"max_abs_logit_error": error}))
        write_json(made / RESULT_FILE, found[0].to_dict())

    partial.finish(last)
    return found[0]
