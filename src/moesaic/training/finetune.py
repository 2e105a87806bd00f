"""THE training: a converted model, a little text and the dense model as teacher; the best state is kept and written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from transformers import PreTrainedModel

from .. import registry
from ..calibration.text import bundled
from ..calibration.windows import token_windows
from ..checkpoint.claim import check_apart
from ..checkpoint.facts import METRICS_FILE, saved_result, saved_settings
from ..checkpoint.writer import CONFIG_FILE
from ..config import FinetuneConfig
from ..errors import WorkError
from ..evaluation.cost import at_experts_per_token
from ..files import write_json
from ..formats.companions import copy_companions
from ..given import optional_path, path, place
from ..machine import machine, peak_rss_bytes, versions
from ..moe.modeling import moe_blocks
from ..progress import Progress, unheard
from ..report.plots import write_training
from ..results import ConversionResult, ExpertLoad, FinetuneResult, LoadChange, PerplexityProtocol, StepRecord
from ..results.evaluation import perplexity_of
from . import parameters as parts
from .data import Samples
from .expert_load import held_out_loss, selection_loss, summary
from .parameters import put_back
from .pictures import remeasured
from .prepare import Finetuning, prepare
from .state import LOG, PROJECT, TrainingState, claimed_training, drop
from .trainer import Trainer
from .written import export_as, written_format

CURVE = "training.png"


def finetune(
    model: str | Path,
    output: str | Path,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    teacher_cache: str | Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Train a converted model a little and write it to `output`, in the format it had; never worse than it came.

    What is written has a next-token loss on held-out text of at most the start's, measured after adapters were merged
    and weights rounded to the dtype on disk; otherwise the start itself is written, and `improved` is false.

    Args:
        model: the folder of a converted model, in any format.
        output: the folder to make; it appears only when whole.
        config: what to do; by default low-rank adapters, taught by the dense model.
        resume: go on with an unfinished training of the same model, text and configuration.
        overwrite: replace `output` if it exists.
        teacher_cache: a folder for the teacher's logits, to be used by later trainings on the same text.
        clock: what `minutes` go by, in seconds; `time.process_time` counts the processor's.
        progress: called with (per cent done, 100, a note) after each step.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: no gradient reached what should learn.
    """
    output = path(output)
    check_apart(model, output)
    with claimed_training(output, overwrite):
        run = prepare(
            place(str(model)), output, config or FinetuneConfig(), resume=resume, overwrite=overwrite,
            cache=optional_path(teacher_cache),
        )  # fmt: skip
        return run_training(run, clock, progress)


def run_training(run: Finetuning, clock: Callable[[], float], progress: Progress | None) -> FinetuneResult:
    """Train what was prepared, and write the best."""
    student = run.load()
    before = measure(student, run)
    trainer = make_trainer(run, student)
    learned = parts.counts(trainer.named.items())
    state = train(run, trainer, restore(run, trainer, before.selection_loss(run.config.locality)), clock, progress)
    del student, trainer  # the model that is written needs the room
    settled = choose_result(run, state, before)
    result = summarise(run, state, before, settled, learned)
    if run.accelerator.is_main_process:
        result = write(run, settled.model, result, state)
    run.accelerator.wait_for_everyone()
    return result


def train(
    run: Finetuning,
    trainer: Trainer,
    state: TrainingState,
    clock: Callable[[], float],
    progress: Progress | None,
) -> TrainingState:
    """Train to the end, showing every step to the caller and to trackers.

    Raises:
        WorkError: the device's memory did not suffice.
    """
    run.accelerator.init_trackers(PROJECT)
    report = progress or unheard
    try:
        state = trainer.fit(state, clock, lambda row, done, held_out: tell(run, report, row, done, held_out))
    except torch.OutOfMemoryError as error:
        raise WorkError(f"out of memory: {error}; use a smaller --window or --batch") from error
    for tracker in run.accelerator.trackers:
        tracker.finish()
    return state


class HeldOutResult(NamedTuple):
    """What was measured on held-out text."""

    loss: float
    """Next-token loss, nats a token."""
    load: ExpertLoad

    def selection_loss(self, locality: float) -> float:
        """Compute what decides which state is best."""
        return selection_loss(self.loss, self.load, locality)


class Settled(NamedTuple):
    """The model that is written."""

    model: PreTrainedModel
    measured: HeldOutResult
    improved: bool
    """Whether it is the best of the training; else the model as it came."""


def choose_result(run: Finetuning, state: TrainingState, before: HeldOutResult) -> Settled:
    """Take the best of the training or, if that is no better, the model as it came."""
    run.accelerator.free_memory()
    if run.teacher:
        run.teacher.forget()
    if state.best_step:
        trained = best_model(run, state.best_step)
        after = measure(trained, run)
        if after.selection_loss(run.config.locality) <= before.selection_loss(run.config.locality):
            return Settled(trained, after, True)
        del trained
    return Settled(run.load(), before, False)


def summarise(
    run: Finetuning, state: TrainingState, before: HeldOutResult, settled: Settled, learned: dict[str, int]
) -> FinetuneResult:
    """Say what a training did."""
    return FinetuneResult(
        method=registry.text("method", run.config.method),
        objective=run.config.objective,
        held_out_loss_before=before.loss,
        held_out_loss=settled.measured.loss,
        held_out_tokens=run.held.scored(),
        steps=state.step,
        best_step=state.best_step,
        tokens=sum(row.tokens for row in state.history),
        seconds=state.seconds,
        processes=run.accelerator.num_processes,
        load=LoadChange(before=before.load, after=settled.measured.load),
        improved=settled.improved,
        trainable_parameters=learned,
    )


def best_model(run: Finetuning, step: int) -> PreTrainedModel:
    """Load the model of least held-out loss, that after a step, adapters merged, in the dtype that it is written in."""
    module = run.method.prepare(run.load())
    best = run.folder.best(step)
    put_back({name: p for name, p in module.named_parameters() if name in best}, best)
    trained = run.method.finish(module)
    for dtype in (run.source.checkpoint.dtype(), run.dtype):  # rounded as on disk
        parts.same_dtype(trained, dtype)
    return trained


def make_trainer(run: Finetuning, student: PreTrainedModel) -> Trainer:
    """Make the training of a model that is loaded; adapters start as the seed says."""
    device = run.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(run.config.seed)
        module = run.method.prepare(student)
    return Trainer(run, student, module)


def measure(model: PreTrainedModel, run: Finetuning, samples: Samples | None = None) -> HeldOutResult:
    """Measure loss and load of a model on what is held out, or on other samples."""
    samples = samples or run.held
    found = held_out_loss(model, moe_blocks(model), samples, run.accelerator.device, run.dtype)
    load = summary(found.loads, samples.count(), found.kept)
    return HeldOutResult(found.total.item() / samples.scored(), load)


def restore(run: Finetuning, trainer: Trainer, before: float) -> TrainingState:
    """Go back to where an unfinished training stopped, its weights and optimizer put back; or to the start."""
    found = run.folder.load()
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        run.folder.start_log(found.state.history if found else [])
    if not found:
        return TrainingState(held_out=trainer.agreed(before))
    return trainer.restore(found)


def tell(run: Finetuning, report: Progress, row: StepRecord, done: float, held_out: float) -> None:
    """Say what a step did: to the caller, and to trackers that are installed."""
    losses = {"loss": row.loss} | ({} if row.held_out is None else {"held_out": row.held_out})
    run.accelerator.log(losses, step=row.step)
    speed = row.tokens / max(1e-9, row.step_seconds)
    note = f"step {row.step}, loss {row.loss:.3f}, held-out {held_out:.3f}, {speed:.0f} tokens/s"
    if run.accelerator.is_main_process:
        report(round(100 * done), 100, note)


def write(run: Finetuning, trained: PreTrainedModel, result: FinetuneResult, state: TrainingState) -> FinetuneResult:
    """Write the model, in the format that it came in if that can say it, and what is known of it."""
    folder, made = run.source.checkpoint.folder, run.folder.path / "model"
    shutil.rmtree(made, ignore_errors=True)
    known = saved_result(folder)
    found = perplexity(run, trained, known.perplexity_protocol)
    parts.same_dtype(trained, run.source.checkpoint.dtype())
    pictures = known.pictures
    settings = saved_settings(folder)
    if run.processor is not None and pictures is not None:
        pictures = remeasured(trained, run.processor, pictures, settings["config"]["held_out_tokens"])
    trained.save_pretrained(made, save_original_format=False)  # under the names that tensors have in memory
    run.tokenizer.save_pretrained(made)
    copy_companions(folder, made)
    asked = settings | {"finetune": run.config.model_dump(mode="json")}
    (made / CONFIG_FILE).write_text(yaml.safe_dump(asked, sort_keys=False))
    chosen = written_format(run, trained)
    result = replace(
        result, output=str(run.output), format=chosen.format.name, format_reason=chosen.reason,
        perplexity_dense=known.perplexity_dense, perplexity_before=known.perplexity, perplexity=found,
        peak_rss_bytes=peak_rss_bytes(), versions=versions(), machine=machine(),
    )  # fmt: skip
    write_training(state.history, result, made / CURVE)
    shutil.copyfile(run.folder.path / LOG, made / LOG)
    metrics = replace(
        active(run, trained, known, result), output=str(run.output), finetune=result, perplexity=found,
        pictures=pictures,
    ).judged(settings["config"]["collapse_ratio"])  # fmt: skip
    write_json(made / METRICS_FILE, metrics.to_dict())
    written = export_as(made, run.output, chosen, run.overwrite)
    drop(run.output)
    return replace(result, format=written.format.name, format_reason=written.reason)


def active(
    run: Finetuning, trained: PreTrainedModel, known: ConversionResult, result: FinetuneResult
) -> ConversionResult:
    """Say what one token runs on average, if the model lets the number of experts vary."""
    dynamic = any(block.gate.selection.dynamic_top_k for block in moe_blocks(trained) if block.gate is not None)
    if not (dynamic and result.improved):
        return known
    return at_experts_per_token(known, run.source.config, result.load.after.experts_per_token)


def perplexity(run: Finetuning, model: PreTrainedModel, protocol: PerplexityProtocol) -> float:
    """Measure the trained model on the bundled held-out text, as the conversion measured it."""
    tokens_NL = token_windows(bundled("heldout"), run.tokenizer, protocol.tokens, protocol.window)
    samples = Samples(tokens_NL, torch.ones_like(tokens_NL, dtype=torch.bool))
    return perplexity_of(measure(model, run, samples).loss)
