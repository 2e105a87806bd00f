"""The rows of a frontier: how they are measured, which conversion each stands for, and their summary over seeds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

from ..calibration.prompts import OWN, own_text
from ..config import ConvertConfig
from ..files import read_json
from ..given import check, path
from ..plan import nearest_plan
from ..results import FrontierResult, FrontierRow, FrontierSummary, Json
from .recipes import METHODS, ORACLE

WINDOW = 2_048
"""Tokens that are scored together."""


@dataclass(frozen=True)
class Measurement:
    """How every row of a frontier is measured; rows of another measurement are not mixed with these."""

    text: str | None = None
    max_tokens: int | None = None
    tasks: str | None = None
    items: int | None = None
    """Of each task, at most so many."""
    calibration: tuple[str, ...] = ()
    tokens: int = 16_384
    speed: bool = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: one is out of its limits.
        """
        check(max_tokens=self.max_tokens, items=self.items, tokens=self.tokens)

    def setting(self) -> Json:
        """Say what decides the numbers, wherever the files lie: names and SHA-256 in place of paths."""
        return {
            "text": hashed_name(self.text), "max_tokens": self.max_tokens, "tasks": hashed_name(self.tasks),
            "items": self.items,
            "calibration": [hashed_name(source) for source in self.calibration], "tokens": self.tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One conversion of the frontier."""

    method: str
    active: float
    memory_factor: float
    seed: int

    @classmethod
    def of(cls, row: FrontierRow) -> Point:
        """Find the point that a row was measured for."""
        return cls(row.method, row.active, row.memory_factor, row.seed)

    def config(self, measurement: Measurement) -> ConvertConfig:
        """Make the configuration of the conversion that it stands for."""
        method = METHODS[self.method]
        plan = str(nearest_plan(self.active, method.groups, method.groups)) if method.groups else None
        return ConvertConfig(
            active=None if plan else self.active, plan=plan, memory_factor=self.memory_factor, seed=self.seed,
            partition=method.partition, recovery=method.recovery, router=method.router,
            calibration=measurement.calibration, tokens=measurement.tokens, fine=method.fine,
        )  # fmt: skip


def hashed_name(source: str | None) -> str | None:
    """Name a file and its SHA-256, also one of prompts; what is no file (a dataset) by its name alone."""
    own = own_text(source) if source else None
    if own and own.file:
        return f"{OWN}:{hashed_name(str(own.file))}"
    if source is None or not isfile(file := path(source)):
        return source
    return f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


class Shape(NamedTuple):
    """What decides a conversion's speed, whatever its method."""

    plan: str
    expert_width: int


def shape_of(row: FrontierRow) -> Shape | None:
    """Find a row's shape; None for a bound."""
    if row.plan is None or row.expert_width is None:
        return None
    if row.method in METHODS and METHODS[row.method].router == ORACLE:
        return None
    return Shape(row.plan, row.expert_width)


def read_frontier(file: Path) -> FrontierResult:
    """Read a `frontier.json`.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    values = read_json(file)
    speeds = {
        "speeds": [_with_details(s, "plan", "expert_width") for s in values.get("speeds", [])],
        "sibling_speeds": [_with_details(s, "fingerprint") for s in values.get("sibling_speeds", [])],
    }
    return FrontierResult.from_dict({"unfit": {}, "summary": []} | values | speeds, str(file))


def _with_details(speed: Json, *names: str) -> Json:
    """Gather what a speed's record says beside what it is of."""
    known = {name: speed[name] for name in (*names, "machine", "speedup")}
    return known | {"details": {name: value for name, value in speed.items() if name not in known}}


def summarise(rows: Sequence[FrontierRow]) -> list[FrontierSummary]:
    """Sum up rows that differ by seed only.

    `default` may take another cut with another seed, which makes another line.
    """
    groups: dict[tuple[object, ...], list[FrontierRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.active, row.memory_factor, row.partition, row.plan), []).append(row)
    summary = []
    for same in groups.values():
        first, ratios = same[0], [row.perplexity_ratio for row in same]
        mean = sum(ratios) / len(ratios)
        tasks = [row.tasks_mean for row in same if row.tasks_mean is not None]
        summary.append(
            FrontierSummary(
                method=first.method, active=first.active, ffn_active=first.ffn_active,
                memory_factor=first.memory_factor, memory=first.memory, plan=first.plan, partition=first.partition,
                speedup=first.speedup, speed_is=first.speed_is, perplexity_ratio=mean,
                perplexity_ratio_deviation=math.sqrt(sum((r - mean) ** 2 for r in ratios) / max(1, len(ratios) - 1)),
                active_parameters=first.active_parameters, active_ratio=first.active_ratio, line=first.line,
                over_line=sum(row.over_line or 0 for row in same) / len(same) if first.line else None,
                line_by=first.line_by, extrapolated=first.extrapolated, line_by_speed=first.line_by_speed,
                line_by_parameters=first.line_by_parameters, seeds=len(same),
                tasks_mean=sum(tasks) / len(tasks) if tasks else None, tasks_stderr=first.tasks_stderr,
            )
        )  # fmt: skip
    return summary
