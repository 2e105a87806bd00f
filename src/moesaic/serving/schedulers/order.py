"""The order in which requests are offered to a batch, so that few distinct experts run in it: Read-ME's Algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A request that has tokens to run."""

    experts: frozenset[int]
    """What its next tokens run, its signature; empty if unknown."""
    tokens: int
    """How many are next."""
    waited: int = 0
    """Batches since it was in one."""


class Room(NamedTuple):
    """What a batch has room for."""

    tokens: int
    patience: int
    """Batches that a request waits at most before it goes first."""
    resident: frozenset[int] = frozenset()
    """Experts that are in fast memory."""
    experts: int | None = None
    """Distinct experts that a batch is kept within, those that fast memory holds; None: any number."""


class Order(NamedTuple):
    """Candidates by their positions, each once."""

    offered: list[int]
    kept_back: list[int]
    """Those whose experts would push out others; they run if none of the offered can."""


def by_expert(candidates: Sequence[Candidate], room: Room) -> Order:
    """Order candidates by expert: a queue for each signature, taken whole until the tokens of a batch are spent.

    First come those that have waited too long, the longest wait first, so that none starves. Then the queue whose
    experts are most like those of the batch so far, or at its start those in fast memory (Jaccard); among equals the
    one of most requests, among those the one that came first. With one expert a signature this is Read-ME's Algorithm
    1; with the set of a prefill's experts it groups requests as ELDR does. A queue that would bring the batch's experts
    and the resident ones above what fast memory holds is kept back: until the others are done, or it is late.

    Args:
        candidates: in the order of arrival, one a request.
        room: of the batch.

    Returns:
        What to offer, and what to keep back; what is beyond the tokens follows in the order of arrival.
    """
    late = sorted(
        (i for i, c in enumerate(candidates) if c.waited >= room.patience), key=lambda i: -candidates[i].waited
    )
    first = set(late)
    rest = [i for i in range(len(candidates)) if i not in first]
    if room.experts is None and sum(c.tokens for c in candidates) <= room.tokens:  # all of them run
        return Order([*late, *rest], [])
    queues: dict[int, list[int]] = {}
    for i in rest:
        queues.setdefault(_bits(candidates[i].experts), []).append(i)
    running = 0 if late else _bits(room.resident)
    for i in late:
        running |= _bits(candidates[i].experts)
    left = room.tokens - sum(candidates[i].tokens for i in late)
    taken: list[int] = []
    kept_back: list[int] = []
    while left > 0 and queues:
        best = max(queues, key=lambda bits: (_likeness(running, bits), len(queues[bits]), -queues[bits][0]))
        members = queues.pop(best)
        if room.experts is not None and (late or taken) and (running | best).bit_count() > room.experts:
            kept_back += members
            continue
        taken += members
        running |= best
        left -= sum(candidates[i].tokens for i in members)
    return Order([*late, *taken, *sorted(i for members in queues.values() for i in members)], sorted(kept_back))


def _bits(experts: frozenset[int]) -> int:
    """Write a set as the bits of a number: sets of hundreds of experts are compared in no time."""
    bits = 0
    for expert in experts:
        bits |= 1 << expert
    return bits


def _likeness(one: int, other: int) -> float:
    """Compute Jaccard's index of two sets; 0 of two empty ones."""
    union = (one | other).bit_count()
    return (one & other).bit_count() / union if union else 0.0
