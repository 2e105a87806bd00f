"""Conversion and light training in one go, as much of both as there is time for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import linear

from . import registry
from .calibration.text import bundled
from .calibration.windows import token_windows
from .checkpoint.claim import check_apart, remove
from .checkpoint.facts import METRICS_FILE, saved_result, saved_settings
from .checkpoint.single_file import MADE, ResumableFile, claim_file
from .checkpoint.writer import ResumableOutput, beside, claim_output, partial_folder, read_state
from .config import ConvertConfig, FinetuneConfig
from .conversion import convert as converting
from .conversion.auto import EVERY, candidates, unwritten
from .conversion.engines import GGUF, for_output
from .conversion.gguf import write_checked_gguf
from .conversion.prepare import Conversion
from .errors import InputError
from .files import read_json, write_json
from .formats.converted import Converted
from .formats.engines import LLAMA_CPP, choose_for
from .formats.export import write_metrics
from .given import path, place
from .models.devices import choose_device
from .models.tokenizer import load_tokenizer
from .progress import Progress, unheard
from .registry import nearest
from .results import ConversionResult

WINDOW = 512
"""Tokens of a training sequence, where the model's context is as long."""
FORWARDS, FITS = 4, 2
"""Runs of a layer, and of products of its neurons with each other, in one conversion of it."""
FINGERPRINT, MARK = "fingerprint.json", {"command": "convert --effort"}
"""What OUT.effort is known by."""
LAST = {"step": "taking OUT's place"}
"""Of the state of OUT.partial in the moment when a trained model becomes OUT."""


@dataclass(frozen=True)
class Effort:
    """How much is put into a conversion."""

    tokens: int
    """Calibration tokens on a CPU."""
    gpu_tokens: int
    minutes: float
    """Of light training after it."""


EFFORTS = {"fast": Effort(16_384, 16_384, 0), "good": Effort(65_536, 131_072, 15), "best": Effort(98_304, 196_608, 60)}


def effort_of(name: str) -> Effort:
    """Find an effort by its name.

    Raises:
        InputError: there is none of that name; the message has the nearest.
    """
    if name not in EFFORTS:
        raise InputError(f"no effort '{name}'.{nearest(name, EFFORTS)} Choose from: {', '.join(EFFORTS)}")
    return EFFORTS[name]


def at_effort(config: ConvertConfig, effort: str) -> ConvertConfig:
    """Give a configuration the effort's calibration tokens, unless it says how many."""
    found = effort_of(effort)
    if "tokens" in config.model_fields_set or not found.minutes:
        return config
    tokens = found.tokens if choose_device(config.device).type == "cpu" else found.gpu_tokens
    return ConvertConfig(**{name: getattr(config, name) for name in config.model_fields_set} | {"tokens": tokens})


@dataclass(frozen=True)
class Estimate:
    """About how long a conversion will take on this machine."""

    convert_minutes: float
    train_minutes: float

    def __str__(self) -> str:
        convert = f"about {max(1, round(self.convert_minutes)):.0f} min to convert"
        return f"{convert}, {self.train_minutes:g} min to train" if self.train_minutes else convert


def estimate(model: str | Path, config: ConvertConfig | None = None, effort: str = "fast") -> Estimate:
    """Estimate the minutes of a conversion from a few products on this machine; text that is to be written not counted.

    Raises:
        InputError: what `convert` refuses, or a training that does not fit in memory.
    """
    config = at_effort(config or ConvertConfig(), effort)
    check = unwritten(config)
    conversions = candidates(place(str(model)), check)
    minutes = effort_of(effort).minutes
    check_training(conversions, minutes)
    products = sum(
        _products(conversion, config.tokens / check.tokens, share) for conversion, share in _passes(conversions)
    )
    return Estimate(products / _speed(conversions[0]) / 60, minutes)


def _passes(conversions: list[Conversion]) -> list[tuple[Conversion, float]]:
    """List conversions with the share of their layers that is converted: of trials a part, of the last all."""
    trials = [(conversion, 0.5 / EVERY) for conversion in conversions] if len(conversions) > 1 else []
    return [*trials, (conversions[-1], 1.0)]


def _products(conversion: Conversion, tokens: float, share: float) -> float:
    """Count multiplications: both models' layers on all tokens, and the Gram matrices of the fits."""
    layers = conversion.layerwise.layers
    layer = sum(parameter.numel() for parameter in layers[-1].parameters())
    width: int = conversion.layerwise.config.intermediate_size
    forward = FORWARDS * layer
    fit = FITS * (conversion.plan.ffn_active(width) * width) ** 2
    return share * tokens * conversion.tokens.count() * len(layers) * (forward + fit)


def _speed(conversion: Conversion) -> float:
    """Measure multiplications a second."""
    device, dtype = conversion.layerwise.device, conversion.layerwise.dtype
    x_TD = torch.zeros(512, 1_024, dtype=dtype, device=device)
    weight_ID = torch.zeros(2_048, 1_024, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        linear(x_TD, weight_ID).sum().item()
        seconds.append(time.perf_counter() - start)
    return x_TD.shape[0] * weight_ID.numel() / min(seconds)


def convert(
    model: str | Path,
    output: str | Path,
    config: ConvertConfig | None = None,
    *,
    effort: str = "fast",
    resume: bool = True,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    training_progress: Progress | None = None,
) -> ConversionResult:
    """Turn a dense model into a Mixture-of-Experts and write it to `output`; with more effort, train it a little too.

    Args:
        model: hub id, folder, .gguf file or built-in name (`tiny`, `demo`, `demo-1.5b`, `gemma-270m`).
        output: the folder to make; it appears only when whole.
        config: what to do; by default half of each FFN is active.
        effort: `fast`; `good`: four times the tokens (on a GPU eight) and 15 minutes of training; `best`: six (twelve)
            and an hour. Tokens that `config` gives stay.
        resume: go on with unfinished work on the same model, data and configuration.
        overwrite: replace `output` if it exists.
        force: keep a collapsed result.
        progress: called with (done, all, note), of layers.
        training_progress: called so of per cent of the training; None: `progress` is.

    Returns:
        What `metrics.json` holds; `finetune` in it is the training.

    Raises:
        InputError: something given cannot work; nothing costly was done.
        WorkError: a self-test failed or the result collapsed.
    """
    minutes, config = effort_of(effort).minutes, at_effort(config or ConvertConfig(), effort)
    options = {"resume": resume, "progress": progress}
    if not minutes:
        return converting.convert(model, output, config, overwrite=overwrite, force=force, **options)
    output, model = path(output), place(str(model))
    check_apart(model, output)
    from .training.finetune import finetune  # which says what to install, before the conversion

    config, one_file = for_output(config, output), output.suffix.lower() == GGUF
    with (claim_file if one_file else claim_output)(output, overwrite), work_folder(output) as work:
        check_unfinished(output, resume)
        made, trained = work / "converted", work / f"trained-{minutes:g}"  # each length has a training of its own
        whole = resume and _is_made(made, model, config)
        if not (whole and _is_trained(trained, made)):
            if not whole:
                check_training(candidates(model, unwritten(config)), minutes)
                for old in work.glob("trained-*"):  # of another conversion
                    remove(old)
                converting.convert(model, made, config, overwrite=True, force=force, gguf=False, **options)
            options["progress"] = training_progress or progress
            finetune(made, trained, training_of(made, model, config, minutes), overwrite=True, **options)
        result = write_final_metrics(trained, output, config, progress or unheard)
        take_place(trained, output)
        remove(work)
    return result


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """Make the folder of unfinished work, `OUT.effort`; if nothing was put there, it is gone afterwards.

    Raises:
        InputError: something else has that name, a converted model too.
    """
    work = beside(output, ".effort")
    mark = work / FINGERPRINT
    if os.path.lexists(work) and not (mark.is_file() and read_json(mark) == MARK):
        raise InputError(f"'{work}' is in the way; it is no unfinished work of --effort. Move it or choose another OUT")
    work.mkdir(exist_ok=True)
    write_json(mark, MARK)
    try:
        yield work
    finally:
        if work.is_dir() and {path.name for path in work.iterdir()} <= {FINGERPRINT}:
            remove(work)


def check_training(conversions: list[Conversion], minutes: float) -> None:
    """Check before a conversion that its training will fit in memory, whichever of the candidates it is.

    Raises:
        InputError: it will not, or training is not installed.
    """
    from .training.prepare import check_conversion

    for conversion in conversions if minutes else ():
        longest = conversion.layerwise.config.max_position_embeddings
        check_conversion(conversion, FinetuneConfig(minutes=minutes, window=min(WINDOW, longest)))


def training_of(made: Path, model: str, config: ConvertConfig, minutes: float) -> FinetuneConfig:
    """Say how a conversion is trained: on its calibration text, taught by the model that it was made of."""
    longest: int = Converted(made).config.max_position_embeddings
    text = tuple(saved_settings(made)["config"]["calibration"])
    return FinetuneConfig(
        teacher=model, data=text, minutes=minutes, window=min(WINDOW, longest), seed=config.seed, device=config.device
    )


def write_final_metrics(trained: Path, output: Path, config: ConvertConfig, report: Progress) -> ConversionResult:
    """Write metrics and card of a trained model as those of OUT, and before them the GGUF if it is for llama.cpp."""
    known = saved_result(trained)
    assert known.finetune is not None
    known = replace(known, output=str(output), finetune=replace(known.finetune, output=str(output)))
    if config.engine == LLAMA_CPP:
        engine, protocol = choose_for(LLAMA_CPP, config.outtype), known.perplexity_protocol
        tokens_NL = token_windows(bundled("heldout"), load_tokenizer(trained), protocol.tokens, protocol.window)
        called = output if output.suffix.lower() == GGUF else output / MADE
        device = choose_device(config.device)
        written = write_checked_gguf(trained, engine.outtype or "", called, tokens_NL, device, report)
        known = replace(known, engine=engine, gguf=written)
    write_metrics(trained, known.to_dict(), registry.build("format", known.format), known.check)
    return saved_result(trained)


def check_unfinished(output: Path, resume: bool) -> None:
    """Check that OUT.partial holds no unfinished work that the same command without --effort would go on with.

    Raises:
        InputError: it does.
    """
    folder = partial_folder(output)
    found = read_state(folder)
    if resume and found and found.fingerprint != LAST:
        raise InputError(
            f"'{folder}' holds an unfinished conversion without --effort; repeat that command to finish it, or start "
            "anew: pass --no-resume, or delete that folder"
        )


def take_place(trained: Path, output: Path) -> None:
    """Give a finished folder, or the GGUF in it, the name OUT, as a conversion does."""
    if output.suffix.lower() == GGUF:
        partial: ResumableOutput = ResumableFile(output, LAST, resume=False)
        (trained / MADE).replace(partial.folder / MADE)
        partial.take_place()
    else:
        partial = ResumableOutput(output, LAST, resume=False, inner=True)
        remove(partial.folder)
        trained.rename(partial.folder)
        partial.take_place()


def _is_trained(trained: Path, made: Path) -> bool:
    """Tell whether a conversion's training was finished before."""
    found = saved_result(trained) if (trained / METRICS_FILE).is_file() else None
    return found is not None and found.finetune is not None and found.fingerprint == saved_result(made).fingerprint


def _is_made(made: Path, model: str, config: ConvertConfig) -> bool:
    """Tell whether the conversion to be trained was finished before."""
    if not (made / METRICS_FILE).is_file():
        return False
    found = saved_result(made).fingerprint
    return any(conversion.fingerprint == found for conversion in candidates(model, config))
