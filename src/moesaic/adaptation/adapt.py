"""THE adaptation: how many experts run for each token, learnt or calibrated to a budget, kept as an adapter."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from .. import registry
from ..calibration.text import bundled
from ..calibration.windows import token_windows
from ..checkpoint.claim import check_apart
from ..checkpoint.facts import METRICS_FILE, saved_result, saved_settings
from ..checkpoint.writer import CONFIG_FILE, ResumableOutput, claim_output
from ..config import AdaptConfig
from ..errors import InputError, WorkError
from ..evaluation.cost import at_experts_per_token
from ..evaluation.experts import inspect_passage
from ..files import write_json
from ..formats.adapter import Adapter
from ..formats.companions import copy_companions
from ..formats.converted import Converted
from ..formats.export import export
from ..given import path, place
from ..machine import machine, peak_rss_bytes, versions
from ..models.processor import Processor
from ..moe.adaptive import attach
from ..moe.modeling import MODEL_TYPE
from ..progress import Progress, unheard
from ..report.passage import write_heat_map, write_passage_page
from ..report.plots import write_adaptation
from ..results import AdaptResult, AdaptStep, ConversionResult, PerplexityProtocol
from ..results.evaluation import perplexity_of
from ..routing.selection.top_k import TopK
from ..store.opening import StoreOptions
from ..training.data import Samples
from ..training.pictures import remeasured as answers_of
from ..training.state import LOG, claimed_training, drop
from .budget import Calibrated, calibrate
from .policy import Policy, make_policy
from .prepare import Adaptation, check_text, prepare
from .trainer import AdaptState, AdaptTrainer, Measured, measure

COMPARABLE = 0.05
"""How far two mean numbers of experts may lie apart, for losses to be compared."""
CURVE, HEAT_MAP, HEAT_PAGE = "adaptation.png", "experts.png", "experts.html"


def adapt(
    model: str | Path,
    output: str | Path,
    config: AdaptConfig | None = None,
    *,
    store: StoreOptions | None = None,
    resume: bool = True,
    overwrite: bool = False,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress | None = None,
) -> AdaptResult:
    """Make the number of experts vary by token in any Mixture-of-Experts, and write that as an adapter to `output`.

    The model is frozen and its files are not changed. `load(model, adapter=output)` puts the adapter to work. What is
    written is never worse than the rule was before it was trained, at the same number of experts on held-out text.

    Args:
        model: a stock Mixture-of-Experts or a converted model: hub id, folder or built-in name.
        output: the folder to make; it appears only when whole.
        config: what to do; by default a threshold that is learnt, at 70 per cent of the model's own number of experts.
        store: how much memory experts get while the model runs, as `load` takes it; for rules that do not learn, and
            the learner `ppo`. None: all are loaded.
        resume: go on with an unfinished training of the same model, text and configuration.
        overwrite: replace `output` if it exists.
        clock: what `minutes` go by, in seconds.
        progress: called with (per cent done, 100, a note) after each step.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: the loss is not finite, or memory did not suffice.
    """
    output = path(output)
    check_apart(model, output)
    with claimed_training(output, overwrite):
        run = prepare(place(str(model)), output, config or AdaptConfig(), store, resume=resume, overwrite=overwrite)
        try:
            return run_adaptation(run, clock, progress)
        except torch.OutOfMemoryError as error:
            raise WorkError(f"out of memory: {error}; use a smaller --window or --batch") from error


class Found(NamedTuple):
    """The selection that is written."""

    calibrated: Calibrated
    measured: Measured
    start_loss: float
    improved: bool
    state: AdaptState | None


def run_adaptation(run: Adaptation, clock: Callable[[], float], progress: Progress | None) -> AdaptResult:
    """Train or calibrate what was prepared, and write it."""
    report = progress or unheard
    begun = clock()
    policy = make_policy(run.load(), run.selection)
    for samples in (run.train, run.held):
        check_text(samples, policy.model, run.tokenizer)
    report(0, 100, "measuring the model as it is")
    default = measure(policy.model, run.held)
    found = calibrate_only(run, policy) if run.learner is None else learn(run, policy, clock, report)
    result = summarise(run, policy, default, found, clock() - begun)
    if run.accelerator.is_main_process:
        result = write(run, policy, found, result)
    run.accelerator.wait_for_everyone()
    return result


def calibrate_only(run: Adaptation, policy: Policy) -> Found:
    """Bring a rule that does not learn to the budget."""
    mean = run.config.target_active * policy.default
    found = calibrate(policy.model, policy.rankers, run.selection, policy.values(), mean, run.calibration())
    measured = measure(policy.model, run.held, found.selection, found.parameters)
    return Found(found, measured, measured.loss, True, None)


def learn(run: Adaptation, policy: Policy, clock: Callable[[], float], report: Progress) -> Found:
    """Train a selection, bring it to the budget, and take it if it is better there than it started."""
    assert run.learner is not None
    mean = run.config.target_active * policy.default
    trainer = AdaptTrainer(
        run.config, run.learner, policy, run.train, run.held, run.accelerator, run.folder, run.calibration()
    )
    kept = run.folder.load()
    run.accelerator.wait_for_everyone()  # or a slow process would find what a fast one has just kept
    state = trainer.begin(mean, kept)

    def tell(row: AdaptStep, done: float) -> None:
        note = f"step {row.step}, {row.experts_per_token:.2f} experts, gap {row.gap:+.3f} nats"
        report(round(100 * done), 100, note)

    state = trainer.fit(state, clock, tell)
    trained = trainer.calibrated(mean)
    measured = measure(policy.model, run.held, trained.selection, trained.parameters)
    comparable = abs(state.start_experts / measured.experts_per_token - 1) <= COMPARABLE
    if measured.loss <= state.start_loss or not comparable:  # a policy that says nothing yet meets no budget
        return Found(trained, measured, state.start_loss, True, state)
    start = run.folder.best(state.best_step)
    values = [{name: start[f"layers.{n}.{name}"] for name in own} for n, own in enumerate(policy.parameters)]
    policy.put(values)
    policy.selection = policy.selection.with_budget(state.start_budget or 0.0)
    first = trainer.calibrated(mean)
    measured = measure(policy.model, run.held, first.selection, first.parameters)
    return Found(first, measured, state.start_loss, False, state)


def summarise(run: Adaptation, policy: Policy, default: Measured, found: Found, seconds: float) -> AdaptResult:
    """Say what was found."""
    history = found.state.history if found.state else []
    return AdaptResult(
        method=registry.spec(found.calibrated.selection),
        learner=None if run.learner is None else registry.spec(run.learner),
        model=run.name,
        target_active=run.config.target_active,
        active=found.measured.experts_per_token / default.experts_per_token,
        experts_per_token=found.measured.experts_per_token,
        calibrated_experts_per_token=found.calibrated.experts_per_token,
        default_experts_per_token=policy.default,
        num_experts=max(ranker.block.num_experts for ranker in policy.rankers),
        experts_by_layer=found.measured.experts_by_layer,
        experts_by_modality=found.measured.experts_by_modality,
        held_out_loss_default=default.loss,
        held_out_loss_start=found.start_loss,
        held_out_loss=found.measured.loss,
        held_out_tokens=run.held.scored(),
        improved=found.improved,
        steps=len(history),
        tokens=sum(row.tokens for row in history),
        seconds=seconds,
        parameters=sum(value.numel() for values in found.calibrated.parameters for value in values.values()),
        processes=run.accelerator.num_processes,
        inside=run.config.inside,
    )


def write(run: Adaptation, policy: Policy, found: Found, result: AdaptResult) -> AdaptResult:
    """Write the adapter, or the converted model with the selection in it."""
    result = replace(
        result, output=str(run.output), peak_rss_bytes=peak_rss_bytes(), versions=versions(), machine=machine()
    )
    history = found.state.history if found.state else []
    if run.config.inside:
        write_inside(run, policy, found, result)
    else:
        with claim_output(run.output, run.overwrite):
            output = ResumableOutput(run.output, {}, resume=False)
            Adapter(
                found.calibrated.selection, found.calibrated.parameters, run.name, run.checkpoint.fingerprint(),
                result.to_dict(),
            ).save(output.folder)  # fmt: skip
            describe(run, result, history, output.folder)
            picture(run, policy, found, output.folder)
            if not history:  # by whose log the folder of a training that was written is known
                drop(run.output)
            output.take_place()
    drop(run.output)
    return result


def describe(run: Adaptation, result: AdaptResult, history: list[AdaptStep], folder: Path) -> None:
    """Write what was asked for and what was found beside an adapter or a model."""
    settings = {"model": run.name, "adapt": run.config.model_dump(mode="json")}
    if (run.checkpoint.folder / CONFIG_FILE).is_file():
        settings = saved_settings(run.checkpoint.folder) | {"adapt": settings["adapt"]}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    if history:
        shutil.copyfile(run.folder.path / LOG, folder / LOG)
        write_adaptation(history, result, folder / CURVE)


def picture(run: Adaptation, policy: Policy, found: Found, folder: Path) -> None:
    """Draw how many experts each token of a held-out passage runs, as a picture and as a page."""
    rule = found.calibrated.selection
    try:
        with attach(policy.model, rule, found.calibrated.parameters):
            passage = inspect_passage(policy.model, run.tokenizer)
    except InputError as error:  # the bundled text is not what was asked for, so it must not cost what was found
        logging.getLogger("moesaic").warning(f"no picture of the experts: {error}")
        return
    title = f"{run.name}: experts a token, {registry.spec_name(type(rule))}"
    write_heat_map(passage, folder / HEAT_MAP, title)
    write_passage_page(passage, folder / HEAT_PAGE, title)


def write_inside(run: Adaptation, policy: Policy, found: Found, result: AdaptResult) -> None:
    """Write the converted model with the selection in its gates, in moesaic's own format."""
    made, source = run.folder.path / "model", run.checkpoint.folder
    shutil.rmtree(made, ignore_errors=True)
    converted, selection = Converted(source), found.calibrated.selection
    model: Any = converted.load(run.checkpoint.dtype())
    fixed = selection.k if isinstance(selection, TopK) else 0
    if fixed:  # which every format can say
        model.config.get_text_config().num_experts_per_tok = fixed
        model.save_pretrained(made, save_original_format=False)
    else:
        with attach(model, selection, found.calibrated.parameters):
            model.config.get_text_config().selection = registry.spec(selection)
            model.save_pretrained(made, save_original_format=False)
    run.tokenizer.save_pretrained(made)
    copy_companions(source, made)
    describe(run, result, found.state.history if found.state else [], made)
    picture(run, policy, found, made)
    known = at_experts_per_token(saved_result(source), converted.config, result.experts_per_token)
    known = remeasured(run, policy, found, known)
    if fixed:
        known = replace(known, plan=re.sub(r"A\d+", f"A{fixed}", known.plan))
        settings = yaml.safe_load((made / CONFIG_FILE).read_text()) | {"plan": known.plan}
        (made / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    write_json(made / METRICS_FILE, known.to_dict() | {"adapt": result.to_dict()})
    export(made, run.output, converted.format if fixed else MODEL_TYPE, resume=False, overwrite=run.overwrite)


def perplexity(run: Adaptation, policy: Policy, found: Found, protocol: PerplexityProtocol) -> float:
    """Measure the adapted model as the conversion was measured."""
    tokens_NL = token_windows(bundled("heldout"), run.tokenizer, protocol.tokens, protocol.window)
    samples = Samples(tokens_NL, torch.ones_like(tokens_NL, dtype=torch.bool))
    loss = measure(policy.model, samples, found.calibrated.selection, found.calibrated.parameters).loss
    return perplexity_of(loss)


def remeasured(run: Adaptation, policy: Policy, found: Found, known: ConversionResult) -> ConversionResult:
    """Correct what a conversion's result says of its quality, as the conversion measured it."""
    pictures, folder = known.pictures, run.checkpoint.folder
    settings = saved_settings(folder)["config"]
    if pictures is not None:
        with attach(policy.model, found.calibrated.selection, found.calibrated.parameters):
            processor = Processor(folder, policy.model.config)
            pictures = answers_of(policy.model, processor, pictures, settings["held_out_tokens"])
    now = perplexity(run, policy, found, known.perplexity_protocol)
    method = registry.spec_name(type(found.calibrated.selection))
    changed = known.changed(
        "adapted", method, f"{found.measured.experts_per_token:.2f} of {policy.default} routed experts run for a "
        "token, on average", now,
    )  # fmt: skip
    return replace(changed, pictures=pictures).judged(settings["collapse_ratio"])
