"""THE training: a converted model, a little text and the dense model as teacher; the best state is kept and written."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from ..calibration.text import bundled, token_windows
from ..checkpoint.writer import CONFIG_FILE
from ..config import ConvertConfig
from ..errors import InputError, WorkError
from ..formats.converted import choose_format
from ..formats.export import COPIED, export
from ..machine import machine, peak_rss_bytes, versions
from ..moe.modeling import MODEL_TYPE, moe_blocks
from . import parts
from .balance import summary
from .config import FinetuneConfig
from .data import Samples
from .held_out import held_out_loss
from .prepare import Run, prepare
from .shards import put_back
from .state import LOG
from .trainer import State, Trainer

CURVE = "training.png"
PROJECT = "moesaic"
"""What trackers know a training by; TensorBoard's files are in a folder of that name."""


def finetune(
    model: str | Path,
    output: str | Path,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    teacher_cache: str | Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Train a converted model a little and write it to `output`, in the form it had; never worse than it came.

    What is written has a next-token loss on held-out text of at most the start's, measured after adapters were merged
    and weights rounded to the dtype on disk; otherwise the start itself is written, and `improved` is false.

    Args:
        model: the folder of a converted model, in any form.
        output: the folder to make; it appears only when whole.
        config: what to do; by default low-rank adapters, taught by the dense model.
        resume: go on with an unfinished training of the same model, text and configuration.
        overwrite: replace `output` if it exists.
        teacher_cache: a folder for the teacher's logits, to be used by later trainings on the same text.
        clock: what `minutes` go by, in seconds; `time.process_time` counts the processor's.
        progress: called with (done, all, note) after each step.

    Returns:
        `output, format, improved, held_out_loss, held_out_loss_before, perplexity, perplexity_before, steps, tokens,
        seconds, trainable_parameters{part: n}, load{before, after}, ...`; of several processes only the main one
        has `output`.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: no gradient reached what should learn.
    """
    output = Path(output)
    run = prepare(
        model, output, config or FinetuneConfig(), resume=resume, overwrite=overwrite,
        cache=Path(teacher_cache) if teacher_cache else None,
    )  # fmt: skip
    student = run.load()
    before = measure(student, run)
    trainer = make_trainer(run, student)
    learned = parts.counts(trainer.named.items())
    state = train(run, trainer, restore(run, trainer, before[0]), clock, progress)
    del student, trainer  # the model that is written needs the room
    trained, after, improved = settle(run, state, before)
    facts = summarise(run, state, before, after) | {"improved": improved, "trainable_parameters": learned}
    if run.accelerator.is_main_process:
        facts = write(run, trained, facts, state)
    run.accelerator.wait_for_everyone()
    return facts


def train(
    run: Run, trainer: Trainer, state: State, clock: Callable[[], float], progress: Callable[..., None] | None
) -> State:
    """Train to the end, telling people and trackers of every step.

    Raises:
        WorkError: the device's memory did not suffice.
    """
    run.accelerator.init_trackers(PROJECT)
    report = progress or (lambda done, count, note="": None)
    try:
        state = trainer.fit(state, clock, lambda row: tell(run, report, row))
    except torch.OutOfMemoryError as error:
        raise WorkError(f"out of memory: {error}; use a smaller --window or --batch") from error
    for tracker in run.accelerator.trackers:
        tracker.finish()
    return state


Measured = tuple[float, dict[str, Any]]
"""Next-token loss in nats a token, and how evenly the experts are used."""


def settle(run: Run, state: State, before: Measured) -> tuple[PreTrainedModel, Measured, bool]:
    """(the best of the training or, if that is no better, the model as it came; its loss; whether it is better)."""
    run.accelerator.free_memory()
    if run.teacher:
        run.teacher.forget()
    if state.best_step:
        trained = best_model(run)
        after = measure(trained, run)
        if after[0] <= before[0]:
            return trained, after, True
        del trained
    return run.load(), before, False


def summarise(run: Run, state: State, before: Measured, after: Measured) -> dict[str, Any]:
    """What a training did."""
    return {
        "method": run.config.method,
        "objective": run.config.objective,
        "held_out_loss_before": before[0],
        "held_out_loss": after[0],
        "held_out_tokens": run.held.scored(),
        "steps": state.step,
        "best_step": state.best_step,
        "tokens": sum(row["tokens"] for row in state.history),
        "seconds": state.seconds,
        "processes": run.accelerator.num_processes,
        "load": {"before": before[1], "after": after[1]},
    }


def best_model(run: Run) -> PreTrainedModel:
    """The model of least held-out loss, adapters merged, in the dtype that it is written in."""
    module = run.method.prepare(run.load())
    best = run.folder.best()
    put_back({name: p for name, p in module.named_parameters() if name in best}, best)
    trained = run.method.finish(module)
    for dtype in (run.source.checkpoint.dtype(), run.dtype):  # rounded as on disk
        parts.same_dtype(trained, dtype)
    return trained


def make_trainer(run: Run, student: PreTrainedModel) -> Trainer:
    """The training of a model that is loaded; adapters start as the seed says."""
    device = run.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(run.config.seed)
        module = run.method.prepare(student)
    return Trainer(run, student, module)


def measure(model: PreTrainedModel, run: Run, samples: Samples | None = None) -> Measured:
    """Loss and load of a model on what is held out, or on other samples."""
    samples = samples or run.held
    total, loads = held_out_loss(model, moe_blocks(model), samples, run.accelerator.device)
    return total.item() / samples.scored(), summary(loads, samples.tokens_NL.numel())


def restore(run: Run, trainer: Trainer, before: float) -> State:
    """Where an unfinished training stopped, its weights and its optimizer put back; or the start."""
    found = run.folder.load()
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        run.folder.start_log(found["state"]["history"] if found else [])
    if not found:
        return State(held_out=trainer.agreed(before))
    return trainer.restore(found)


def tell(run: Run, report: Callable[..., None], row: dict[str, Any]) -> None:
    """Say what a step did: to people, and to trackers that are installed."""
    run.accelerator.log({name: row[name] for name in ("loss", "held_out") if name in row}, step=row["step"])
    speed = row["tokens"] / max(1e-9, row["step_seconds"])
    note = f"step {row['step']}, loss {row['loss']:.3f}, held-out {row['held_out_last']:.3f}, {speed:.0f} tokens/s"
    if run.accelerator.is_main_process:
        report(round(100 * row["progress"]), 100, note)


def write(run: Run, trained: PreTrainedModel, facts: dict[str, Any], state: State) -> dict[str, Any]:
    """Write the model, in the form that it came in if that can say it, and what is known of it; returns the facts."""
    folder, made = run.source.checkpoint.folder, run.folder.path / "model"
    shutil.rmtree(made, ignore_errors=True)
    known = json.loads((folder / "metrics.json").read_text())
    facts |= {
        "output": str(run.output),
        "perplexity_dense": known["perplexity_dense"],
        "perplexity_before": known["perplexity"],
        "perplexity": perplexity(run, trained, known["perplexity_protocol"]),
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": versions(),
        "machine": machine(),
    }
    parts.same_dtype(trained, run.source.checkpoint.dtype())
    trained.save_pretrained(made)
    run.tokenizer.save_pretrained(made)
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, made / name)
    resolved = yaml.safe_load((folder / CONFIG_FILE).read_text())
    resolved["finetune"] = run.config.model_dump(mode="json")
    (made / CONFIG_FILE).write_text(yaml.safe_dump(resolved, sort_keys=False))
    from ..report.plots import write_training  # matplotlib is slow to import

    write_training(state.history, facts, made / CURVE)
    shutil.copyfile(run.folder.path / LOG, made / LOG)
    form, facts["format_reason"] = written_format(run, trained)
    facts["format"] = form
    metrics = known | {"finetune": facts, "perplexity": facts["perplexity"]} | active(run, known, facts)
    metrics["collapsed"] = not facts["perplexity"] / known["perplexity_dense"] <= ConvertConfig().collapse_ratio
    (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    export(made, run.output, form, overwrite=True)
    if (run.folder.path / PROJECT).is_dir():
        shutil.copytree(run.folder.path / PROJECT, run.output / "tensorboard", dirs_exist_ok=True)
    shutil.rmtree(run.folder.path)
    return facts


def active(run: Run, known: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What one token runs of a model whose method lets the number of experts vary, on average over held-out text."""
    if not (run.method.dynamic_top_k and facts["improved"]):
        return {}
    c, count = run.source.config, facts["load"]["after"]["experts_per_token"]
    neurons = c.shared_expert_intermediate_size + count * c.moe_intermediate_size
    more = 3 * c.num_hidden_layers * c.hidden_size * c.moe_intermediate_size * (count - c.num_experts_per_tok)
    return {"ffn_active": neurons / c.intermediate_size, "active_parameters": known["active_parameters"] + round(more)}


def written_format(run: Run, trained: PreTrainedModel) -> tuple[str, str]:
    """(the form to write, why it is not the one that the model came in, or nothing)."""
    has_bias = any(bool(b.gate.e_score_correction_bias.any()) for b in moe_blocks(trained) if b.gate is not None)
    try:
        form, _ = choose_format(run.source.format.name, trained.config, has_bias)
        return form.name, ""
    except InputError as error:
        return MODEL_TYPE, str(error)


def perplexity(run: Run, model: PreTrainedModel, protocol: dict[str, Any]) -> float:
    """Of the trained model on the bundled held-out text, as the conversion measured it."""
    tokens_NL = token_windows(bundled("heldout"), run.tokenizer, protocol["tokens"], protocol["window"])
    samples = Samples(tokens_NL, torch.ones_like(tokens_NL, dtype=torch.bool))
    return math.exp(min(700.0, measure(model, run, samples)[0]))
