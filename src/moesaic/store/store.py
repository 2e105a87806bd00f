"""Bring experts from the slow tier into the fast one when they are needed, or before."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

import torch

from ..errors import WorkError
from .policies.base import CacheSize, ExpertKey, Future, Policy, unknown
from .readers import Readers
from .slots import make_slots
from .source import ExpertSource, ExpertWeights
from .step import Counts, Entry, Expert, Step


class ExpertStore:
    """Experts of one model, of which a fixed number is in fast memory; safe for several threads.

    Args:
        source: where all experts are.
        like: an expert's shapes and dtype.
        capacity: experts that the fast tier holds.
        policy: which of them leaves when another one comes.
        device: whose memory the fast tier is.
        readers: threads that read.

    Raises:
        InputError: a capacity with which the policy cannot work.
    """

    def __init__(
        self,
        source: ExpertSource,
        like: ExpertWeights,
        capacity: int,
        policy: Policy,
        device: torch.device,
        readers: int = 2,
    ) -> None:
        self.source, self.like, self.policy, self.device, self.readers = source, like, policy, device, readers
        self.size = CacheSize(capacity, source.num_layers, source.num_experts)
        self.expert_bytes = sum(part.numel() * part.dtype.itemsize for part in like)
        self.cache = policy.cache(self.size)
        self.slots = make_slots(capacity, like, device)
        self.entries: dict[ExpertKey, Entry] = {}
        self._in_layer: list[set[int]] = [set() for _ in range(source.num_layers)]
        self._pinned: set[ExpertKey] = set()
        self._early: set[ExpertKey] = set()
        self._reading: set[ExpertKey] = set()
        """Those that may be on their way still."""
        self.counts = Counts()
        self.cache_bias = 0.0
        """How much routers prefer what is here (`store.bias`); above 0 the model is not quite the checkpoint's."""
        self.trace: list[tuple[int, tuple[int, ...]]] | None = None
        """Layers and the experts that they asked for, if it is a list; for whoever wants to replay them."""
        self._changed = threading.Condition(threading.RLock())
        self._readers = Readers(readers, self._changed)
        weakref.finalize(self, self._readers.close)
        self._closed = False

    def visit(
        self,
        layer: int,
        experts: Sequence[int],
        future: Future = unknown,
        meanwhile: Callable[[], None] | None = None,
    ) -> Iterator[Expert]:
        """Give each of a layer's experts in turn: those that are there first, while the others are read.

        An expert's weights are its own until the next one is taken from the iterator.

        Args:
            layer: of the layers that have experts.
            experts: that its tokens use, ascending, each once.
            future: when experts are used next, as far as that is known.
            meanwhile: what to do once the layer's own experts are being read.

        Raises:
            WorkError: one cannot be read.
        """
        keys = [ExpertKey(layer, expert) for expert in experts]
        step = Step(future, self.readers)
        try:
            with self._changed:
                self._begin(layer, experts)
                for key in keys:
                    self._drop_failed(key)
                step.waiting.extend(key for key in keys if key not in self.entries)
                for key in keys:
                    if key in self.entries:
                        self._pin(key)
                        step.held.append(key)
                step.there = len(step.held)
                self.counts.hits += step.there
                self.counts.misses += len(step.waiting)
                self._fetch(step)
            if meanwhile is not None:
                meanwhile()
            while step.held or step.waiting:
                if not step.held:  # all slots are others', or on their way
                    self._wait_for_room(step)
                    continue
                key = step.held[0]
                yield Expert(key.expert, self._ready(key))
                with self._changed:
                    self._unpin(step.done())
                    self._fetch(step)
        finally:
            with self._changed:
                for key in step.held:
                    self._unpin(key)

    def _begin(self, layer: int, experts: Sequence[int]) -> None:
        if self._closed:
            raise WorkError("the expert store is closed; load the model again")
        if self.trace is not None:
            self.trace.append((layer, tuple(experts)))
        self.cache.begin(layer)

    def _pin(self, key: ExpertKey) -> None:
        entry = self.entries[key]
        entry.pins += 1
        self._pinned.add(key)
        if entry.early:
            entry.early = False
            self._early.discard(key)
            self._readers.hurry(entry.task)
        self.cache.use(key)

    def _unpin(self, key: ExpertKey) -> None:
        entry = self.entries[key]
        self.slots.leave(entry.slot)
        entry.pins -= 1
        if not entry.pins:
            self._pinned.discard(key)
        self._drop_failed(key)
        self._changed.notify_all()

    def _fetch(self, step: Step) -> None:
        """Start to read those that wait, as long as there is room and their turn has come."""
        while step.may_fetch():
            key = step.waiting[0]
            if key not in self.entries and not self._start(key, step.future):
                return
            step.waiting.popleft()
            self._pin(key)
            step.held.append(key)

    def _start(self, key: ExpertKey, future: Future, *, early: bool = False) -> bool:
        """Give an expert a slot and begin to read it; says no if all that might leave are in use or on their way."""
        while self.cache.full(key):
            self._reading = {k for k in self._reading if k in self.entries and not self.entries[k].task.done()}
            victim = self.cache.victim(key, self._pinned | self._reading, future)
            if victim is not None:
                self._drop(victim)
            elif early or not self._cancel(set()):
                return False
        slot = self.slots.free[-1]
        self.entries[key] = Entry(slot, self._readers.submit(lambda: self._read(slot, key), early=early), early=early)
        self.slots.free.pop()
        self._reading.add(key)
        self._in_layer[key.layer].add(key.expert)
        if early:
            self._early.add(key)
        self.cache.admit(key)
        return True

    def _read(self, slot: int, key: ExpertKey) -> int:
        size = self.slots.fill(slot, self.source, key)
        with self._changed:
            self.counts.bytes_read += size
        return size

    def _drop_failed(self, key: ExpertKey) -> None:
        """Let whoever needs an expert next read it again."""
        entry = self.entries.get(key)
        if entry is not None and not entry.pins and entry.failed:
            self._drop(key)

    def _drop(self, key: ExpertKey) -> None:
        entry = self.entries.pop(key)
        self._in_layer[key.layer].discard(key.expert)
        self._early.discard(key)
        self.cache.evict(key)
        self.slots.free.append(entry.slot)
        self.counts.prefetched_in_vain += entry.early

    def _ready(self, key: ExpertKey) -> ExpertWeights:
        """Wait until a pinned expert is there."""
        entry = self.entries[key]
        begin = time.perf_counter()
        try:
            entry.task.result()
        except WorkError:
            raise
        except Exception as error:
            reason = str(error) or "the store was closed"
            raise WorkError(f"expert {key.expert} of layer {key.layer} cannot be read: {reason}") from error
        finally:
            with self._changed:
                self.counts.waited_seconds += time.perf_counter() - begin
        self.slots.arrive(entry.slot)
        return self.slots.at(entry.slot)

    def _wait_for_room(self, step: Step) -> None:
        begin = time.perf_counter()
        with self._changed:
            self._fetch(step)
            if not step.held:
                self._changed.wait(timeout=1.0)
            self.counts.waited_seconds += time.perf_counter() - begin

    def prefetch(self, keys: Iterable[ExpertKey], future: Future = unknown) -> None:
        """Begin to read experts that a later layer is expected to ask for, as far as there is room.

        Those that were begun for an earlier call, are not among `keys` and have not been read are given up.

        Args:
            keys: the sooner needed the earlier.
            future: when experts are used next.
        """
        wanted = list(dict.fromkeys(keys))
        with self._changed:
            if self._closed:
                return
            self._cancel(set(wanted))
            for key in wanted:
                if key not in self.entries:
                    if not self._start(key, future, early=True):
                        return
                    self.counts.prefetched += 1

    def _cancel(self, wanted: set[ExpertKey]) -> int:
        """Give up early readings that have not begun and are not wanted; returns how many."""
        before = self.counts.cancelled
        for key in self._early - wanted:
            entry = self.entries[key]
            if entry.task.cancel():
                entry.early = False
                self._drop(key)
                self.counts.cancelled += 1
        return self.counts.cancelled - before

    def holds_all(self) -> bool:
        """Tell whether every expert of the model is in the fast tier, or on its way."""
        return len(self.entries) == self.size.num_layers * self.size.num_experts

    def resident(self, layer: int) -> list[int]:
        """List the experts of a layer that are in the fast tier or on their way, ascending."""
        with self._changed:
            return sorted(self._in_layer[layer])

    def report(self) -> dict[str, float]:
        """Give the counts so far by name, the share of hits, and the bytes of the fast tier and of all experts."""
        with self._changed:
            held, all_experts = self.size.capacity, self.size.num_layers * self.size.num_experts
            return asdict(self.counts) | {
                "hit_ratio": self.counts.hit_ratio,
                "cache_bias": self.cache_bias,
                "memory_bytes": held * self.expert_bytes,
                "all_bytes": all_experts * self.expert_bytes,
            }

    def close(self) -> None:
        """Stop the threads and let go of the files; the model cannot run any more."""
        with self._changed:
            self._closed = True
        self._readers.close()
        self.source.close()
