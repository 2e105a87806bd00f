"""Which way to cut a model: the candidates are tried on part of it, and the one that speaks best is taken.

Layer errors do not rank methods as perplexity does, so whole models are compared: every `EVERY`-th layer converted, the
others dense, and the loss on calibration tokens that the trial was not fitted to. Cuts that are equal on the
calibration's own domain may differ by far on another, so bundled text of six domains counts as much. A tie goes to the
first candidate, whose few wide products run faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .calibration.text import bundled, token_windows
from .config import ConvertConfig
from .errors import InputError
from .job import Job, prepare
from .layer import convert_layer, embed
from .models.writer import ResumableOutput

CANDIDATES = (("specialists", False), ("coactivation", False), ("coactivation", True))
"""Partitions and whether they are cut fine, which is tried where the configuration says `fine`."""
EVERY = 3
FEWEST_TOKENS, MOST_TOKENS = 8_192, 32_768
"""Of a trial; between them half of the calibration's. Few tokens favour cuts that few tokens suffice for."""
TIE = 0.01
"""Nats of held-out loss (1 % of perplexity), below which the order of two candidates is chance."""
PART = 4
"""One window in this many is held out."""
Progress = Callable[[int, int, dict[str, Any] | None], None]
"""Called with (finished layers, all layers, record of the last); a trial's is `{"trial": "coactivation S2A2E8"}`."""


def candidates(model: str, config: ConvertConfig) -> list[Job]:
    """A checked job for each way to cut that the configuration leaves open; one if it names a partition.

    Raises:
        InputError: none of them fits (the error is that of the first), or the fine one that was asked for does not.
    """
    if config.active is None and config.plan is None:
        config = config.model_copy(update={"active": 0.5})
    if config.partition != "auto":
        return [prepare(model, config)]
    jobs: list[Job] = []
    errors: list[InputError] = []
    for name, fine in CANDIDATES:
        if fine > config.fine:
            continue
        changes: dict[str, Any] = {"partition": name, "fine": fine}
        if name == "coactivation" and config.memory_factor > 1:
            changes["memory_factor"] = 1.0  # a budget is no duty, and disjoint experts may be better all the same
        try:
            job = prepare(model, config.model_copy(update=changes))
            jobs.append(replace(job, stream=jobs[0].stream) if jobs else job)  # its outer weights once in memory
        except InputError as error:
            if fine:
                raise
            errors.append(error)
    if not jobs:
        raise errors[0]
    windows = len(jobs[0].tokens_NL)
    if len(jobs) > 1 and windows < PART:
        raise InputError(
            f"{windows} calibration windows are too few for --partition auto, which holds out one in {PART}; raise "
            "--tokens or name a partition"
        )
    return jobs


def choose(
    jobs: list[Job], partial: ResumableOutput, progress: Progress | None = None
) -> tuple[Job, list[dict[str, Any]]]:
    """The first job within `TIE` of the least held-out loss, and what each trial gave.

    Finished trials are kept in the partial output.
    """
    if len(jobs) == 1:
        return jobs[0], []
    for job in jobs:
        if job.name not in partial.trials:
            partial.add_trial(job.name, trial(job, progress))
    found = [
        {
            "partition": job.config.partition, "plan": str(job.plan), "width": job.plan.width,
            "held_out_loss": partial.trials[job.name],
        }
        for job in jobs
    ]  # fmt: skip
    least = min(result["held_out_loss"] for result in found)
    best = next(
        (i for i, result in enumerate(found) if result["held_out_loss"] <= least + TIE), 0
    )  # 0: none is a number
    return jobs[best], found


def trial_windows(tokens: int, window: int) -> int:
    """Windows of a trial, fitted and held out, for so many calibration tokens."""
    return max(PART, min(max(tokens // 2, FEWEST_TOKENS), MOST_TOKENS) // window)


@torch.no_grad()
def trial(job: Job, progress: Progress | None = None) -> float:
    """Mean next-token loss in nats on held-out calibration tokens with every `EVERY`-th layer converted.

    Half of them are bundled text if the calibration text is the user's.
    """
    window = job.tokens_NL.shape[1]
    count = min(len(job.tokens_NL), trial_windows(job.config.tokens, window))
    pick = torch.arange(count) * len(job.tokens_NL) // count
    fit = pick[[i for i in range(count) if i % PART != PART - 1]]
    held_out_NL = job.tokens_NL[pick[PART - 1 :: PART]]
    if job.config.calibration:
        other_NL = token_windows(bundled("calibration"), job.tokenizer, held_out_NL.numel(), window)
        held_out_NL = torch.cat([held_out_NL, other_NL])
    tokens_NL = job.tokens_NL[fit]
    first_N1 = job.first_N1[: len(job.first_N1) * len(fit) // len(job.tokens_NL)]
    job = replace(
        job, tokens_NL=tokens_NL, domain_N=job.domain_N[fit], first_N1=first_N1, validation_NL=tokens_NL[:0],
        held_out_NL=held_out_NL,
    )  # fmt: skip
    stream = job.stream
    stream.load_outer()
    states = embed(job)
    del states["dense"]  # nothing is compared with it
    for index in range(len(stream.layers)):
        if progress:
            progress(index, len(stream.layers), {"trial": job.name})
        if index % EVERY == EVERY - 1:
            _, states, _ = convert_layer(job, index, states)
            continue
        with stream.layer(index) as layer:
            states = {name: stream.run(index, layer, hidden_NLD) for name, hidden_NLD in states.items()}
    return stream.token_losses(job.held_out_NL, states["converted"]).mean().item()
