"""The pipeline of depth: judge layers, leave some out, heal the others; one decoder layer at a time.

Two passes: the source runs on the calibration tokens and its layers are judged; then it runs again beside the pruned
model, whose layers are fitted to its residual stream. Shapes: N sequences, L tokens in one, D hidden size.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import registry
from ...calibration.layers import relative_weights
from ...checkpoint.facts import copy_terms, origin
from ...checkpoint.writer import ResumableOutput
from ...config import PruneConfig
from ...conversion.temperature import Temperature, fit_temperature
from ...evaluation.cost import active_weights
from ...evaluation.layerwise import layerwise_perplexity
from ...evaluation.perplexity import held_out_protocol
from ...files import write_json
from ...machine import give_back_memory, machine, peak_rss_bytes, versions
from ...models.devices import begun_dtype, dtype_name
from ...models.integrity import check_numbers
from ...models.layerwise import LayerwiseModel
from ...progress import Progress
from ...results import DepthResult, HealedLayer, Json
from ..finish import RESULT_FILE, check_collapse, finish_stock, parameters, stock_error
from ..prepare import check_room
from .heal import Streams, heal
from .prepare import DepthPruning, distances, prepare

DISTANCE = "distance {:05d}"
"""Under which a pass's finding is kept in the unfinished output."""


def prune_depth(
    model: str, output: Path, config: PruneConfig, *, resume: bool, force: bool, progress: Progress
) -> DepthResult:
    """Leave out decoder layers; `pruning.prune` has the words of its arguments, and has claimed `output`."""
    start = time.monotonic()
    pruning = prepare(model, config, begun_dtype(output) if resume else None)
    layerwise = pruning.source.layerwise
    check_room(output, layerwise, 2 * sum(tokens_NL.numel() for tokens_NL in pruning.texts.values()))
    layerwise.check_finite()
    partial = ResumableOutput(output, pruning.fingerprint, resume)
    records = [HealedLayer.from_dict(record, str(partial.folder)) for record in partial.layers]
    start -= sum(record.seconds for record in records)
    layerwise.load_embeddings_and_head()
    found = judge(pruning, partial, progress)
    removed = pruning.pruner.choose(found, pruning.drop)
    kept = [index for index in range(len(layerwise.layers)) if index not in removed]
    pruning.source.shorter_model(kept)
    states = prune_layers(pruning, kept, partial, records, progress)
    temperature = fit(pruning, states)
    notes = pruning.source.write_outside(partial, kept, temperature.tensors)
    pruning.tokenizer.save_pretrained(partial.folder)
    copy_terms(pruning.folder, partial.folder)
    result = measure(pruning, output, kept, found, records, states, temperature, notes, start)
    more = f"more layers than {result.num_hidden_layers}, or give --recovery closed-form"
    check_collapse(result, more, partial, force)
    return finish(pruning, partial, result, states)


def judge(pruning: DepthPruning, partial: ResumableOutput, report: Progress) -> list[float]:
    """Measure what the method goes by, or read it from an unfinished output."""
    layerwise, drop = pruning.source.layerwise, pruning.drop
    if drop and len(partial.trials) == len(layerwise.layers) - pruning.pruner.span(drop) + 1:
        return [partial.trials[name] for name in sorted(partial.trials)]
    found = distances(layerwise, pruning.pruner, layerwise.embed(pruning.texts["calibration"]), drop, report)
    for index, distance in enumerate(found):
        partial.add_trial(DISTANCE.format(index), distance)
    return found


def prune_layers(
    pruning: DepthPruning, kept: list[int], partial: ResumableOutput, records: list[HealedLayer], report: Progress
) -> dict[str, Tensor]:
    """Write and heal the layers that are not finished, and add to `records`.

    Returns:
        What leaves the last layer, by `source TEXT` and `pruned TEXT`.

    Raises:
        WorkError: hidden states are NaN or infinite.
        StorageError: the disk is full.
    """
    layerwise = pruning.source.layerwise
    texts = [name for name in pruning.texts if pruning.heals or name == "held_out"]
    embedded = {name: layerwise.embed(pruning.texts[name]) for name in texts}  # so that it knows how to call layers
    states = partial.hidden(layerwise.device, layerwise.dtype)
    if states is None:
        states = {
            f"{path} {name}": hidden.clone() for path in ("source", "pruned") for name, hidden in embedded.items()
        }
        partial.start(states)
    for number in range(len(records), len(kept)):
        report(number, len(kept), "" if not records or records[-1].error is None else f"error {records[-1].error:.3f}")
        record = prune_layer(pruning, kept, number, states, partial)
        records.append(record)
    report(len(kept), len(kept), "checking")
    return states


@torch.no_grad()
def prune_layer(
    pruning: DepthPruning, kept: list[int], number: int, states: dict[str, Tensor], partial: ResumableOutput
) -> HealedLayer:
    """Write the layer that becomes `number`, healed if a layer went before the next one; `states` are moved on.

    The source's stream is taken to where the next layer that stays takes over.
    """
    start, layerwise = time.monotonic(), pruning.source.layerwise
    index, end = kept[number], kept[number + 1] if number + 1 < len(kept) else len(layerwise.layers)
    for other in range(index if number else 0, end):
        with layerwise.layer(other) as layer:
            move(layerwise, other, layer, states, "source")
    gone, gap = end > number + 1, end > index + 1 or number == 0
    fit = pruning.heals and gone and (gap or pruning.pruner.heal_all)
    tensors, before = pruning.source.read(index), None
    with layerwise.layer(index) as layer:
        if fit:
            hidden, target = calibrated(states, "pruned"), calibrated(states, "source")
            after = {name: layerwise.run(index, layer, hidden_NLD) for name, hidden_NLD in hidden.items()}
            before = stream_error(after, target)
            for name in heal(layerwise, index, layer, hidden, target):
                own = layer.get_parameter(name)
                tensors[name] = own.to("cpu", tensors[name].dtype)
                own.copy_(tensors[name])  # later layers see what is written
        move(layerwise, index, layer, states, "pruned")
    give_back_memory()
    check_numbers(states, f"layer {index}, hidden states", layerwise.dtype)
    error = stream_error(calibrated(states, "pruned"), calibrated(states, "source")) if pruning.heals else None
    record = HealedLayer(
        layer=number, source_layer=index, healed=fit, split_error=before if fit else error, error=error,
        seconds=time.monotonic() - start,
    )  # fmt: skip
    partial.add_layer(pruning.source.renamed(tensors, index, number), states, record.to_dict())
    return record


def move(layerwise: LayerwiseModel, index: int, layer: nn.Module, states: dict[str, Tensor], path: str) -> None:
    """Take the streams of one path, `source` or `pruned`, through a layer."""
    for name in states:
        if name.startswith(f"{path} "):
            states[name] = layerwise.run(index, layer, states[name])


def calibrated(states: dict[str, Tensor], path: str) -> Streams:
    """Take the streams of a path that layers are fitted to; the ridge is judged on the last."""
    names = (name for name in ("opening", "calibration") if f"{path} {name}" in states)
    return {name: states[f"{path} {name}"] for name in names}


def stream_error(found: Streams, wanted: Streams) -> float:
    """Measure `sqrt(sum w² ‖d - p‖² / sum w² ‖d‖²)` over all tokens, d the wanted stream, p the found one, w 1/‖d‖."""
    found_TD, wanted_TD = (torch.cat([s.flatten(0, 1) for s in streams.values()]) for streams in (found, wanted))
    weight_T1 = relative_weights(wanted_TD)[:, None]
    wrong = ((wanted_TD.float() - found_TD.float()) * weight_T1).square().sum()
    return (wrong / (wanted_TD.float() * weight_T1).square().sum().clamp(min=1e-30)).sqrt().item()


def fit(pruning: DepthPruning, states: dict[str, Tensor]) -> Temperature:
    """Fit the temperature on calibration windows that no layer is fitted to; 1 without recovery, or without such."""
    if "validation" not in pruning.texts or not pruning.heals:
        return Temperature(1.0, {})
    return fit_temperature(pruning.source.layerwise, pruning.texts["validation"], states["pruned validation"])


def measure(
    pruning: DepthPruning, output: Path, kept: list[int], found: list[float], layers: list[HealedLayer],
    states: dict[str, Tensor], temperature: Temperature, notes: list[str], start: float,
) -> DepthResult:  # fmt: skip
    """Measure a finished pruning; perplexities are `exp(mean loss)` on bundled held-out text."""
    layerwise, config, held_out_NL = pruning.source.layerwise, pruning.config, pruning.texts["held_out"]
    before = layerwise_perplexity(layerwise, held_out_NL, states["source held_out"])
    layerwise.model.load_state_dict(temperature.tensors, strict=False)
    after = layerwise_perplexity(layerwise, held_out_NL, states["pruned held_out"])
    models = [pruning.source.shorter_model(layers) for layers in (range(len(layerwise.layers)), kept)]
    counted, active = [parameters(model) for model in models], [round(active_weights(model)) for model in models]
    return DepthResult(
        output=str(output), model=pruning.model, architecture=pruning.source.checkpoint.architecture(),
        method=registry.text("pruning", config.method), recovery=config.recovery,
        num_hidden_layers_before=len(layerwise.layers), num_hidden_layers=len(kept),
        removed_layers=[index for index in range(len(layerwise.layers)) if index not in kept], distances=found,
        total_parameters_before=counted[0], total_parameters=counted[1],
        active_parameters_before=active[0], active_parameters=active[1],
        perplexity_before=before, perplexity=after, logit_factor=temperature.logit_factor,
        perplexity_protocol=held_out_protocol(held_out_NL),
        layers=layers, max_abs_logit_error=None, notes=notes, collapsed=not after / before <= config.collapse_ratio,
        seed=config.seed, fingerprint=pruning.fingerprint,
        compute_dtype=dtype_name(layerwise.dtype), versions=versions(), machine=machine(),
        peak_rss_bytes=peak_rss_bytes(), seconds=time.monotonic() - start,
    )  # fmt: skip


def finish(
    pruning: DepthPruning, partial: ResumableOutput, result: DepthResult, states: dict[str, Tensor]
) -> DepthResult:
    """Check what was written as transformers loads it, give it its name, and return what `pruning.json` says then.

    Raises:
        WorkError: it does not say what the run layer by layer said.
    """
    layerwise, tokens_1L = pruning.source.layerwise, pruning.texts["held_out"][:1]
    expected_LV = layerwise.logits(tokens_1L, states["pruned held_out"][:1]).float().cpu()
    experts = pruning.source.has_experts
    layerwise.drop_embeddings_and_head()  # the check needs the room
    give_back_memory()
    settings: Json = {"pruning": pruning.config.model_dump(mode="json"), "model": pruning.model, "config": {}}
    settings |= origin(pruning.model, pruning.folder) | {"fingerprint": pruning.fingerprint, "versions": versions()}
    found: list[DepthResult] = []

    def last(made: Path) -> None:
        finish_stock(made, settings, result, experts=experts)
        error = stock_error(made, layerwise, tokens_1L, expected_LV)
        found.append(DepthResult.from_dict(result.to_dict() | {"max_abs_logit_error": error}))
        write_json(made / RESULT_FILE, found[0].to_dict())

    partial.finish(last)
    return found[0]
