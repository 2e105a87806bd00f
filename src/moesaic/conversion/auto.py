"""Which way to cut a model: the candidates are tried on part of it, and the one that speaks best is taken.

Layer errors do not rank methods as perplexity does, so whole models are compared: every `EVERY`-th layer converted, the
others dense, and the loss on calibration tokens that the trial was not fitted to. Cuts that are equal on the
calibration's own domain may differ by far on another, so bundled text of six domains counts as much. A tie goes to the
first candidate, whose few wide products run faster.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import registry
from ..calibration.prompts import BUNDLED, own_text, read_prompts
from ..calibration.text import bundled
from ..calibration.windows import token_windows
from ..checkpoint.sources import resolve
from ..checkpoint.writer import ResumableOutput
from ..config import ConvertConfig
from ..errors import InputError
from ..models.integrity import check_numbers
from ..models.pictured import joined, plain
from ..progress import Progress
from ..results import Trial
from .layer import convert_layer
from .prepare import Conversion, prepare
from .states import embed, run_dense
from .tokens import CalibrationText

CANDIDATES = (("specialists", False), ("coactivation", False), ("coactivation", True))
"""Partitions and whether they are cut fine, which is tried where the configuration says `fine`."""
EVERY = 3
FEWEST_TOKENS, MOST_TOKENS = 8_192, 32_768
"""Of a trial; between them half of the calibration's. Few tokens favour cuts that few tokens suffice for."""
TIE = 0.01
"""Nats of held-out loss (1 % of perplexity), below which the order of two candidates is chance."""
PART = 4
"""One window in this many is held out."""


def candidates(model: str, config: ConvertConfig, compute: torch.dtype | None = None) -> list[Conversion]:
    """Prepare a conversion for each way to cut that the configuration leaves open; one if it names a partition.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        config: what to do.
        compute: the dtype to calculate in; None is the one that the machine is fast in.

    Raises:
        InputError: none of them fits (the error is that of the first), or the fine one that was asked for does not.
    """
    if config.partition != "auto":
        return [prepare(model, config, compute)]
    if config.active is None and config.plan is None:
        config = config.model_copy(update={"active": 0.5})
    if config.router is not None and registry.build("router", config.router).scope == "model":
        raise InputError(
            f"--router {registry.text('router', config.router)} decides for all layers at once, which --partition auto "
            "tries on some only; name the partition, e.g. --partition paths"
        )
    found: list[Conversion] = []
    errors: list[InputError] = []
    for name, fine in CANDIDATES:
        if fine > config.fine:
            continue
        changes: dict[str, object] = {"partition": name, "fine": fine}
        if name == "coactivation" and config.memory_factor > 1:
            changes["memory_factor"] = 1.0  # a budget is no duty, and disjoint experts may be better all the same
        try:
            opened = found[0].layerwise if found else None
            found.append(prepare(model, config.model_copy(update=changes), compute, opened))
        except InputError as error:
            if fine:
                raise
            errors.append(error)
    fixed = config.plan is not None or config.expert_width is not None
    if not found or (errors and fixed and config.memory_factor > 1):  # of which the other candidate takes no notice
        raise errors[0]
    windows = len(found[0].tokens.calibration_NL)
    if len(found) > 1 and windows < PART:
        raise InputError(
            f"{windows} calibration windows are too few for --partition auto, which holds out one in {PART}; raise "
            "--tokens or name a partition"
        )
    return found


def write_text(model: str, config: ConvertConfig, progress: Progress | None = None) -> None:
    """Let the model write the calibration text that it is to write itself, so that `candidates` finds it.

    Raises:
        InputError: anything that `candidates` refuses; before a word is written.
    """
    if (check := unwritten(config)) is not config:
        candidates(model, check)
        folder = resolve(model)
        CalibrationText.of(config).read(folder, progress=progress)


def unwritten(config: ConvertConfig) -> ConvertConfig:
    """Put a little bundled text in place of what the model is to write itself: all else can be checked with it."""
    own = [found for name in config.calibration if (found := own_text(name))]
    if not own:
        return config
    for one in own:
        read_prompts(one)
    tokens = min(config.tokens, max(PART * config.window, FEWEST_TOKENS))
    return config.model_copy(update={"calibration": (), "tokens": tokens})


def choose(
    conversions: list[Conversion], partial: ResumableOutput, progress: Progress | None = None
) -> tuple[Conversion, list[Trial]]:
    """Try the candidates and take the first within `TIE` of the least held-out loss, nats a token.

    Finished trials are kept in the partial output.

    Returns:
        The conversion taken, and what each trial gave.
    """
    if len(conversions) == 1:
        return conversions[0], []
    for conversion in conversions:
        if conversion.name not in partial.trials:
            partial.add_trial(conversion.name, trial(conversion, progress))
    found = [
        Trial(
            partition=registry.text("partition", c.config.partition), plan=str(c.plan), width=c.plan.width,
            held_out_loss=partial.trials[c.name],
        )
        for c in conversions
    ]  # fmt: skip
    least = min(result.held_out_loss for result in found)
    best = next((i for i, result in enumerate(found) if result.held_out_loss <= least + TIE), 0)  # 0: none is a number
    return conversions[best], found


def trial_windows(tokens: int, window: int) -> int:
    """Count the windows of a trial, fitted and held out, for so many calibration tokens."""
    return max(PART, min(max(tokens // 2, FEWEST_TOKENS), MOST_TOKENS) // window)


@torch.no_grad()
def trial(conversion: Conversion, progress: Progress | None = None) -> float:
    """Measure the mean next-token loss in nats on held-out calibration tokens with every `EVERY`-th layer converted.

    Half of them are bundled text if the calibration text is the user's.
    """
    tokens, layerwise = conversion.tokens, conversion.layerwise
    all_NL, pictured = tokens.calibration_NL, dict(tokens.pictured)
    window, count = all_NL.shape[1], min(len(all_NL), trial_windows(conversion.config.tokens, all_NL.shape[1]))
    pick = torch.arange(count) * len(all_NL) // count
    fit = pick[[i for i in range(count) if i % PART != PART - 1]]
    held_out_NL = all_NL[pick[PART - 1 :: PART]]
    if shown := pictured.get("calibration"):
        pictured = {"calibration": shown.take(fit), "held_out": shown.take(pick[PART - 1 :: PART])}
    if (sources := conversion.config.calibration) and BUNDLED not in sources:
        other_NL = token_windows(bundled("calibration"), conversion.tokenizer, held_out_NL.numel(), window)
        held_out_NL = torch.cat([held_out_NL, other_NL])
        if shown:
            pictured["held_out"] = joined([pictured["held_out"], plain(other_NL)])
    part = replace(
        tokens, calibration_NL=all_NL[fit], domain_N=tokens.domain_N[fit], validation_NL=all_NL[:0],
        opening_M1=tokens.opening_M1[: len(tokens.opening_M1) * len(fit) // len(all_NL)], held_out_NL=held_out_NL,
        pictured=pictured,
    )  # fmt: skip
    conversion = replace(conversion, tokens=part)
    layerwise.load_embeddings_and_head()
    states = embed(layerwise, part, dense=False)
    for index in range(len(layerwise.layers)):
        if progress:
            progress(index, len(layerwise.layers), f"trying {conversion.name}")
        if index in conversion.layers[EVERY - 1 :: EVERY]:
            states = convert_layer(conversion, index, states).states
            check_numbers(states.tensors(), f"layer {index}, hidden states", layerwise.dtype)
            continue
        with layerwise.layer(index) as layer:
            states = run_dense(layerwise, index, layer, states)
    losses_NL = layerwise.token_losses(held_out_NL, states.converted)
    return losses_NL[part.scored("held_out", held_out_NL)].mean().item()
