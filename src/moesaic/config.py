"""What a conversion is asked to do: the plan (its shape) and the resolved configuration saved beside its output."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from . import registry
from .errors import InputError

FEWEST = 3
"""Specialists beside a shared expert, at least."""
COARSE, FINE = (4, 16, 64), (48, 64, 128)
"""Groups of a disjoint cut: fewest, wanted, most."""
PLAN = re.compile(r"S(\d+)A(\d+)E(\d+)")


@dataclass(frozen=True)
class Plan:
    """The shape of a converted FFN, written `S3A3E8`: 3 shared + 3 active routed of 8 groups, `width` neurons each."""

    shared: int
    active: int
    groups: int
    width: int
    """Neurons in one group."""

    @property
    def num_experts(self) -> int:
        """Routed experts; none when nothing routed is ever active (static pruning)."""
        return self.groups - self.shared if self.active else 0

    @property
    def shared_width(self) -> int:
        """Neurons of the shared expert."""
        return self.shared * self.width

    def ffn_active(self, intermediate_size: int) -> float:
        """Share of the dense FFN's neurons that one token runs."""
        return (self.shared + self.active) * self.width / intermediate_size

    def memory_factor(self, intermediate_size: int) -> float:
        """Neurons kept in memory, relative to the dense FFN's."""
        return (self.shared + self.num_experts) * self.width / intermediate_size

    def __str__(self) -> str:
        return f"S{self.shared}A{self.active}E{self.groups}"

    def as_static(self) -> Plan:
        """The plan of equal cost without routing."""
        return Plan(self.shared + self.active, 0, self.groups, self.width)


def parse_plan(text: str, intermediate_size: int, expert_width: int | None = None, overlapping: bool = False) -> Plan:
    """A plan like `S3A3E8` for an FFN of that width; overlapping experts may be of any width and number.

    Raises:
        InputError: not of that form, more groups in use than there are, or groups that do not divide the width.
    """
    match = PLAN.fullmatch(text.upper())
    if not match:
        raise InputError(f"plan '{text}' is not of the form S<shared>A<active>E<groups>, e.g. S3A3E8")
    shared, active, groups = map(int, match.groups())
    if not 0 < shared + active <= groups:
        raise InputError(f"plan '{text}' runs {shared + active} of {groups} groups; 1 to {groups} can run")
    if overlapping and expert_width is not None:
        if (shared + active) * expert_width > intermediate_size:
            raise InputError(
                f"plan '{text}' with --expert-width {expert_width} runs {(shared + active) * expert_width} neurons, "
                f"the FFN has {intermediate_size}"
            )
        return Plan(shared, active, groups, expert_width)
    if expert_width is not None and groups * expert_width != intermediate_size:
        fits = intermediate_size % expert_width == 0
        way = f"write E{intermediate_size // expert_width}" if fits else "drop --expert-width"
        raise InputError(
            f"{groups} groups of --expert-width {expert_width} are {groups * expert_width} neurons, the FFN has "
            f"{intermediate_size}; {way}"
        )
    if intermediate_size % groups:
        divisors = [e for e in range(1, intermediate_size + 1) if intermediate_size % e == 0]
        closest = min(divisors, key=lambda e: abs(e - groups))
        raise InputError(
            f"plan '{text}': {groups} groups do not divide the FFN's {intermediate_size} neurons; the nearest count "
            f"that does is {closest}"
        )
    return Plan(shared, active, groups, intermediate_size // groups)


def check_share(active: float) -> None:
    """Refuse what is no share of an FFN.

    Raises:
        InputError: not above 0 and at most 1.
    """
    if not 0 < active <= 1:
        raise InputError(f"--active is {active}; it is a share of the FFN, above 0 and at most 1, e.g. 0.5")


def disjoint_plan(active: float, intermediate_size: int, expert_width: int | None = None, fine: bool = False) -> Plan:
    """The disjoint plan nearest to running `active` of the FFN, half of it shared.

    About sixteen groups, of a width that K-quants (256), q8_0 (32) or at least grouped kernels (8) take, where the
    FFN's width allows; `fine`: about 64, which follow the tokens better and are slow on CPUs.

    Raises:
        InputError: an impossible share or width.
    """
    check_share(active)
    if expert_width is not None:
        if expert_width < 1 or intermediate_size % expert_width:
            widths = [w for w in range(1, intermediate_size + 1) if intermediate_size % w == 0]
            closest = min(widths, key=lambda w: abs(w - expert_width))
            raise InputError(
                f"--expert-width {expert_width} does not divide the FFN's {intermediate_size} neurons; the nearest "
                f"that does is {closest}"
            )
        return nearest_plan(active, intermediate_size, intermediate_size // expert_width)
    fewest, wanted, most = FINE if fine else COARSE
    counts = [e for e in range(fewest, most + 1) if intermediate_size % e == 0]
    if not counts:
        raise InputError(
            f"no group count from {fewest} to {most} divides the FFN's {intermediate_size} neurons; use --plan"
        )

    def cost(groups: int) -> tuple[float, ...]:
        width = intermediate_size // groups
        plan = nearest_plan(active, intermediate_size, groups)
        misfit = next(rank for rank, multiple in enumerate((256, 32, 8, 1)) if width % multiple == 0)
        miss = abs(plan.ffn_active(intermediate_size) - active)
        return (round(miss / 0.02), misfit, abs(groups - wanted))

    return nearest_plan(active, intermediate_size, min(counts, key=cost))


def nearest_plan(active: float, intermediate_size: int, groups: int) -> Plan:
    """The plan of so many groups that is nearest to running `active` of the FFN, half of it shared."""
    running = min(groups, max(1, round(active * groups)))
    shared = running // 2
    return Plan(shared, running - shared, groups, intermediate_size // groups)


def specialists_plan(active: float, memory_factor: float, intermediate_size: int) -> Plan:
    """Top-1 specialists beside a shared expert of the same width, as many as the memory budget holds.

    Where it holds fewer than `FEWEST`, groups are narrower and more of them shared.

    Raises:
        InputError: an impossible share, or a memory budget that leaves nothing to vary.
    """
    check_share(active)
    spare = memory_factor - active
    if spare < 0.01:
        raise InputError(
            f"--memory-factor {memory_factor} leaves no room for specialists beside the {active:.0%} that run; "
            f"give at least {active + 0.1:.1f}"
        )
    shared = max(1, math.ceil((FEWEST * active - memory_factor) / spare - 1e-6))
    wish = active * intermediate_size / (shared + 1)
    # rounded down, so that rounding never costs a specialist
    widths = [int(wish / step + 1e-9) * step for step in (256, 32, 8)]
    close = 0.01 * intermediate_size / (shared + 1)
    width = next((w for w in widths if w and wish - w <= close), max(1, int(wish)))
    groups = int(memory_factor * intermediate_size / width + 1e-6)
    shared = max(1, min(round(active * intermediate_size / width) - 1, groups - FEWEST))
    return Plan(shared, 1, groups, width)


class ConvertConfig(BaseModel):
    """Everything that decides a conversion's result; saved as `moesaic.yaml` with the output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    active: float | None = None
    """Share of each FFN that one token runs; the shape follows from it."""
    memory_factor: float = Field(1.0, gt=0)
    """Size of all experts relative to the dense FFN; `specialists` alone use more than 1, and `auto` may decline it."""
    plan: str | None = None
    """A fixed disjoint shape such as `S3A3E8`, instead of `active`."""
    expert_width: int | None = None
    """Neurons in a group."""
    fine: bool = False
    """About 64 groups in place of 16; with partition `auto`, try that too."""
    partition: str = "auto"
    """Partitioning method; `auto` tries `specialists` and `coactivation` on part of the model and takes the better."""
    router: str | None = None
    """Routing method; None takes the one that belongs to the partition."""
    recovery: str = "closed-form"
    calibration: tuple[str, ...] = ()
    """Text files, .jsonl files or `datasets` names; none means the bundled text."""
    tokens: int = Field(16_384, gt=0)
    """Calibration tokens."""
    window: int = Field(256, gt=1)
    """Tokens in one calibration sequence."""
    first_tokens: int | None = Field(None, ge=0)
    """Tokens, each a text's first, that recovery fits beside the others; None: an eighth of `tokens`, 0 after a BOS."""
    held_out_tokens: int = Field(4_096, gt=0)
    """Tokens of bundled held-out text for the perplexity that is compared with the dense model's."""
    format: str = "auto"
    """`moesaic` (the working form), a native form such as `glm4_moe`, or `auto`: the first native one that holds it."""
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    collapse_ratio: float = 100.0
    """Perplexity above this many times the dense model's is a collapse."""

    @field_validator("partition", "router", "recovery", mode="before")
    @classmethod
    def _spec(cls, value: Any) -> Any:
        """Python may give a method's instance, e.g. `partition=CMoE(top_k=20)`."""
        return value if value is None or isinstance(value, str) else registry.spec(value)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


Config = TypeVar("Config", bound=BaseModel)


def read_recipe(recipe: Path | None, section: str, kind: type[BaseModel]) -> dict[str, Any]:
    """The settings in a YAML file, or in `section` of a saved `moesaic.yaml`; none without a file.

    Raises:
        InputError: no such file, no mapping in it, or an unknown setting (with the nearest name).
    """
    if recipe is None:
        return {}
    if not recipe.is_file():
        raise InputError(f"no recipe '{recipe}'")
    try:
        content: Any = yaml.safe_load(recipe.read_text()) or {}
        content = dict(content.get(section, content))
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"'{recipe}' is not a YAML mapping of settings: {error}") from error
    for name in content:
        if name not in kind.model_fields:
            hint = registry.nearest(str(name), kind.model_fields)
            raise InputError(f"'{recipe}' has an unknown setting '{name}'.{hint}")
    return content


def build_config(kind: type[Config], settings: dict[str, Any]) -> Config:
    """A configuration of these settings.

    Raises:
        InputError: a value that does not fit; the message has the option's name.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{name} is {first['input']!r}: {first['msg'].lower()}") from error
