"""The shape of a converted FFN, and the shape that a wish for less compute comes to."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import InputError
from .given import LIMITS, check

FEWEST = 3
"""Specialists beside a shared expert, at least."""
COARSE, FINE = (4, 16, 64), (48, 64, 128)
"""Groups of a disjoint cut: fewest, wanted, most."""
KEPT_SPEED = 0.9
"""Finer groups are better models: for an engine the finest that keep so much of the speed of its fastest width."""
LAYERS = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?|(odd|even)", re.ASCII)
PLAN = re.compile(r"S(\d{1,9})A(\d{1,9})E(\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Plan:
    """The shape of a converted FFN, written `S3A3E8`: 3 shared + 3 active routed of 8 groups, `width` neurons each."""

    shared: int
    num_experts_per_tok: int
    """Routed experts that run for one token."""
    groups: int
    width: int
    """Neurons in one group."""

    @property
    def num_experts(self) -> int:
        """Routed experts; none when nothing routed is ever active (static pruning)."""
        return self.groups - self.shared if self.num_experts_per_tok else 0

    @property
    def shared_width(self) -> int:
        """Neurons of the shared expert."""
        return self.shared * self.width

    def ffn_active(self, intermediate_size: int) -> float:
        """Count the ffn share: the neurons that one token runs over those of the dense FFN."""
        return (self.shared + self.num_experts_per_tok) * self.width / intermediate_size

    def memory_factor(self, intermediate_size: int) -> float:
        """Count the neurons kept in memory over those of the dense FFN."""
        return (self.shared + self.num_experts) * self.width / intermediate_size

    def __str__(self) -> str:
        return f"S{self.shared}A{self.num_experts_per_tok}E{self.groups}"

    def as_static(self) -> Plan:
        """Make the plan of the same ffn share without routing: all groups that run are shared."""
        return Plan(self.shared + self.num_experts_per_tok, 0, self.groups, self.width)


def dense_layers(text: str, layers: int) -> list[int]:
    """Read which of so many layers keep their dense FFN: numbers and ranges such as `0,2,5-7`, `odd` or `even`.

    Raises:
        InputError: not written so, a layer that there is not, or none that is left to convert.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = LAYERS.fullmatch(part.strip())
        if not match:
            raise InputError(
                f"--dense-layers '{text}' is not of the form 0,2,5-7, and neither odd nor even; layers count from 0"
            )
        first, last, word = match.groups()
        if word is None and int(last or first) < int(first):
            raise InputError(
                f"--dense-layers '{text}' has {part.strip()}, which ends before it begins; {last}-{first}?"
            )
        found |= set(range(word == "odd", layers, 2) if word else range(int(first), int(last or first) + 1))
    if found and max(found) >= layers:
        raise InputError(f"--dense-layers '{text}' has layer {max(found)}; the model's are 0 to {layers - 1}")
    if len(found) == layers:
        raise InputError(f"--dense-layers '{text}' leaves none of the {layers} layers to convert; name fewer")
    return sorted(found)


def parse_plan(text: str, intermediate_size: int, expert_width: int | None = None, overlapping: bool = False) -> Plan:
    """Read a plan like `S3A3E8` for an FFN of `intermediate_size` neurons.

    Args:
        text: the plan.
        intermediate_size: neurons of the dense FFN.
        expert_width: neurons in a group; None divides the FFN among the groups.
        overlapping: whether experts may share neurons, so that they may be of any width and number.

    Raises:
        InputError: not written like `S3A3E8`, more groups in use than there are, or groups that do not divide the FFN.
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
        factor, most = groups * expert_width / intermediate_size, LIMITS["memory_factor"].most
        if factor > most:
            raise InputError(
                f"plan '{text}' with --expert-width {expert_width} is {factor:,.0f} times the FFN; {most} times at most"
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


def disjoint_plan(active: float, intermediate_size: int, expert_width: int | None = None, fine: bool = False) -> Plan:
    """Choose the disjoint plan whose ffn share is nearest to `active`, half of it shared.

    About sixteen groups, of a width that K-quants (256), q8_0 (32) or at least grouped kernels (8) take, where the
    FFN's width allows; `fine`: about 64, which follow the tokens better and are slow on CPUs.

    Raises:
        InputError: an impossible share or width.
    """
    check(active=active)
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
    """Choose the plan of `groups` groups whose ffn share is nearest to `active`, half of it shared."""
    running = min(groups, max(1, round(active * groups)))
    shared = running // 2
    return Plan(shared, running - shared, groups, intermediate_size // groups)


def engine_plan(active: float, intermediate_size: int, least_width: int, multiple: int) -> Plan:
    """Choose the finest disjoint plan near a share whose groups are of `least_width` neurons or more.

    Half of what runs is shared, so that two groups run at least. Widths are multiples of `multiple`, and so wide,
    where the FFN's size allows.

    Raises:
        InputError: an impossible share, or an FFN that nothing divides.
    """
    check(active=active)
    fewest, most = COARSE[0], FINE[2]
    counts = [e for e in range(fewest, most + 1) if intermediate_size % e == 0]
    if not counts:
        raise InputError(
            f"no group count from {fewest} to {most} divides the FFN's {intermediate_size} neurons; use --plan"
        )

    def varies(groups: int) -> bool:
        plan = nearest_plan(active, intermediate_size, groups)
        return plan.shared > 0 and plan.num_experts_per_tok < plan.num_experts

    def cost(groups: int) -> tuple[int, int]:
        share = nearest_plan(active, intermediate_size, groups).ffn_active(intermediate_size)
        return (round(abs(share - active) / 0.02), -groups)

    counts = [e for e in counts if varies(e)] or counts
    counts = [e for e in counts if intermediate_size // e % multiple == 0] or counts
    wide = [e for e in counts if intermediate_size // e >= least_width] or counts[:1]
    return nearest_plan(active, intermediate_size, min(wide, key=cost))


def specialists_plan(active: float, memory_factor: float, intermediate_size: int, multiple: int = 1) -> Plan:
    """Choose top-1 specialists beside a shared expert of the same width, as many as the memory budget holds.

    Where it holds fewer than `FEWEST`, groups are narrower and more of them shared. Widths are multiples of
    `multiple`.

    Raises:
        InputError: an impossible share, or a memory budget that leaves nothing to vary.
    """
    check(active=active, memory_factor=memory_factor)
    spare = memory_factor - active
    if spare < 0.01:
        raise InputError(
            f"--memory-factor {memory_factor} leaves no room for specialists beside the {active:.0%} that run; "
            f"give at least {active + 0.1:.1f}"
        )
    shared = max(1, math.ceil((FEWEST * active - memory_factor) / spare - 1e-6))
    wish = active * intermediate_size / (shared + 1)
    # rounded down, so that rounding never costs a specialist
    widths = [int(wish / step + 1e-9) * step for step in (256, 32, 8) if step % multiple == 0]
    close = 0.01 * intermediate_size / (shared + 1)
    nearest = max(multiple, int(wish / multiple + 1e-9) * multiple)
    width = next((w for w in widths if w and wish - w <= close), nearest)
    groups = int(memory_factor * intermediate_size / width + 1e-6)
    shared = max(1, min(round(active * intermediate_size / width) - 1, groups - FEWEST))
    if groups - shared < 2 or (shared + 1) * width > intermediate_size:
        raise InputError(
            f"an FFN of {intermediate_size} neurons holds no specialists of multiples of {multiple} neurons at "
            f"{active:.0%} active and --memory-factor {memory_factor:g}; give another share, or another --outtype"
        )
    return Plan(shared, 1, groups, width)
