"""Smaller dense models of the same family, measured as conversions are: what a conversion must beat at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..errors import InputError
from ..evaluation.cost import active_weights, ffn_of
from ..evaluation.evaluate import task_processor
from ..evaluation.perplexity import scored_text
from ..formats.converted import is_converted, without_weights
from ..given import optional_path, place
from ..machine import machine
from ..models.families import context_length, decoder_layers, empty, settle_width
from ..models.integrity import check_contents, model_on_meta, read_config
from ..models.moe_block import find_block
from ..models.tokenizer import load_tokenizer
from ..moe.modeling import moesaic_config
from ..plan import parse_plan
from ..results import EvaluationResult, FrontierResult, FrontierRow, FrontierSibling
from .line import place_row, same_tokens, verdicts
from .recipes import BASELINES
from .rows import WINDOW, Measurement, Shape, shape_of, summarise


class Dense(NamedTuple):
    """A dense model of which only the configuration was read."""

    name: str
    """As the user called it."""
    folder: Path
    fingerprint: str
    """Of the weights."""
    former_fingerprint: str
    """Of weights and configuration, as results of older versions have it."""
    parameters: int
    """Active: weights that a decoding step reads."""
    sparse: bool
    """It is none: a Mixture-of-Experts, or a conversion."""


def read_dense(name: str) -> Dense:
    """Read what a model costs, of which nothing but its configuration and names are looked at.

    Raises:
        InputError: no such model, or a damaged one.
    """
    name = place(name)
    folder = resolve(name)
    checkpoint = Checkpoint(folder)
    model = without_weights(checkpoint)
    sparse = is_converted(checkpoint) or any(find_block(layer) for layer in decoder_layers(model))
    if not sparse:
        check_contents(model, checkpoint)
    return Dense(
        name=name, folder=folder, fingerprint=checkpoint.weights_fingerprint(),
        former_fingerprint=checkpoint.fingerprint(), parameters=round(active_weights(model)), sparse=sparse,
    )  # fmt: skip


def check_siblings(model: str, names: Sequence[str], measurement: Measurement) -> list[Dense]:
    """Check that models are smaller dense siblings that can be measured, before any costly work; each once.

    Raises:
        InputError: one is unknown, the model itself, no smaller, no dense model, or cannot be asked the tasks.
    """
    if not names:
        return []
    if isinstance(names, str):
        raise InputError(f"siblings is the text '{names}'; give a list of models, such as ['{names}']")
    big = read_dense(model)
    found: dict[str, Dense] = {}
    for name in names:
        if not name.strip():
            raise InputError("--siblings has an empty name; give models, comma-separated")
        sibling = read_dense(name.strip())
        if sibling.sparse:
            raise InputError(
                f"--siblings {name} is a Mixture-of-Experts or a conversion; siblings are smaller dense models"
            )
        if sibling.fingerprint == big.fingerprint:
            raise InputError(f"--siblings {name} is the model itself, which the line has anyway; give a smaller one")
        if sibling.parameters >= big.parameters:
            raise InputError(
                f"--siblings {name} is not smaller: a token reads {sibling.parameters:,} of its weights, and "
                f"{big.parameters:,} of {model}'s; give a smaller dense model of the family"
            )
        longest = context_length(read_config(sibling.folder))
        if longest < WINDOW:
            raise InputError(
                f"--siblings {name} takes {longest} tokens at once, and windows have {WINDOW}; leave it out"
            )
        task_processor(sibling.folder, optional_path(measurement.tasks))
        found.setdefault(sibling.fingerprint, sibling)
    return list(found.values())


def with_bytes(dense: EvaluationResult, model: str, measurement: Measurement) -> EvaluationResult:
    """Add the bytes that were scored to a record of versions that did not count them, from the tokenizer alone."""
    if dense.scored_bytes is not None:
        return dense
    scored = scored_text(
        load_tokenizer(resolve(model)), text=optional_path(measurement.text), max_tokens=measurement.max_tokens
    )
    return replace(
        dense, scored_tokens=scored.tokens, scored_bytes=scored.bytes,
        bits_per_byte=math.log2(dense.perplexity) * scored.tokens / scored.bytes,
    )  # fmt: skip


def add_sibling(
    result: FrontierResult, model: str, sibling: Dense, own: EvaluationResult, measurement: Measurement
) -> FrontierResult:
    """Add a sibling's row to a frontier, of what was measured of it."""
    assert result.dense is not None
    assert own.bits_per_byte is not None
    dense, big = with_bytes(result.dense, model, measurement), read_dense(model)
    assert dense.scored_bytes is not None
    assert dense.scored_tokens is not None
    same = (own.scored_bytes, own.scored_tokens) == (dense.scored_bytes, dense.scored_tokens)
    found = own.perplexity if same else same_tokens(own.bits_per_byte, dense.scored_bytes, dense.scored_tokens)
    mean = own.tasks.get("mean")
    row = FrontierSibling(
        model=sibling.name, fingerprint=sibling.fingerprint, active_parameters=sibling.parameters,
        active_ratio=sibling.parameters / big.parameters, perplexity=found, evaluation=own, machine=machine(),
        bytes_per_token=sibling.parameters * Checkpoint(big.folder).dtype().itemsize,
        perplexity_ratio=found / dense.perplexity,
        tasks_mean=mean.acc if mean else None, tasks_stderr=mean.stderr if mean else None,
    )  # fmt: skip
    return replace(result, dense=dense, siblings=[*result.siblings, row])


def place_rows(result: FrontierResult, model: str) -> FrontierResult:
    """Put every row beside the siblings' line, sum rows up and say who wins; without siblings sum up alone."""
    rows, said = result.rows, list[str]()
    if result.siblings and result.dense:
        perplexity = result.dense.perplexity
        rows = [place_row(row, result.siblings, perplexity) for row in with_parameters(rows, model)]
        summary = summarise(rows)
        said = verdicts(summary, result.siblings, perplexity)
    return replace(result, rows=rows, summary=summarise(rows), verdict=said)


def with_parameters(rows: Sequence[FrontierRow], model: str) -> list[FrontierRow]:
    """Count the weights that a decoding step of each row's shape reads; bounds by the neurons that run."""
    folder = resolve(model)
    config = read_config(folder)
    dense = model_on_meta(config, folder)
    whole, width = active_weights(dense), settle_width(dense)
    ffns = sum(p.numel() for layer in decoder_layers(dense) for p in ffn_of(layer).parameters())
    counted: dict[Shape, float] = {}
    found = []
    for row in rows:
        if row.method in BASELINES and row.active_parameters is not None:  # counts its own
            found.append(replace(row, active_ratio=row.active_parameters / whole))
            continue
        shape = shape_of(row)
        if shape and shape not in counted:
            plan = parse_plan(shape.plan, width, shape.expert_width, overlapping=True)
            counted[shape] = active_weights(empty(moesaic_config(config, plan)))
        active = counted[shape] if shape else whole - (1 - row.ffn_active) * ffns
        found.append(replace(row, active_parameters=round(active), active_ratio=active / whole))
    return found
