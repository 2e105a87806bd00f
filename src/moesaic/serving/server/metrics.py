"""What a server counts, in Prometheus' form."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

WINDOW = 10.0
"""Seconds that tokens per second are counted over."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
EXPERTS = {
    "hits": "Experts that were in fast memory when they were needed",
    "misses": "Experts that were not in fast memory when they were needed",
    "prefetched": "Experts that were loaded before they were needed",
    "bytes_read": "Bytes of experts that were read from slow memory",
}
"""Of an expert store's counts."""


class Now(Protocol):
    """What a batcher tells about this moment."""

    running: set

    @property
    def model(self) -> object:
        """Runs the requests; it may have an expert store."""
        ...

    @property
    def in_batch(self) -> int:
        """Requests that have begun."""
        ...


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = {"namespace": "moesaic", "registry": self.registry}
        self.requests = Counter("requests", "Answers, by HTTP status; 499 are clients that went away", ["status"], **of)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **of)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers", **of)
        self.first = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", buckets=SECONDS, **of
        )
        self.per_token = Histogram(
            "time_per_output_token_seconds", "Between an answer's tokens, its mean", buckets=PER_TOKEN, **of
        )
        self._recent: deque[tuple[float, int]] = deque()

    def took(self, arrived: float, first: float | None, new: int, before: int) -> None:
        """Count new tokens of an answer that had `before` of them."""
        self.generated_tokens.inc(new)
        if new and first is not None:
            now = time.perf_counter()
            self._recent.append((now, new))
            while self._recent[0][0] < now - WINDOW:
                self._recent.popleft()
            if not before:
                self.first.observe(first - arrived)

    def ended(self, first: float | None, last: float, tokens: int) -> None:
        """Count an answer that has ended."""
        if first is not None and tokens > 1:
            self.per_token.observe((last - first) / (tokens - 1))

    def tokens_per_second(self) -> float:
        """Count tokens of answers over the last seconds."""
        since = time.perf_counter() - WINDOW
        return sum(new for at, new in self._recent.copy() if at >= since) / WINDOW  # another thread adds to it

    def watch(self, now: Now) -> None:
        """Show what a batcher, and its model's expert store, tell at the moment of asking."""
        self.registry.register(Moment(self, now))

    def text(self) -> bytes:
        """Write everything in Prometheus' form."""
        return generate_latest(self.registry)


class Moment(Collector):
    """What is true at the moment of asking."""

    def __init__(self, metrics: Metrics, now: Now) -> None:
        self._metrics, self._now = metrics, now

    def collect(self) -> Iterator[Metric]:
        running = self._now.in_batch
        yield GaugeMetricFamily("moesaic_requests_running", "Requests in the batches", running)
        waiting = max(0, len(self._now.running) - running)
        yield GaugeMetricFamily("moesaic_requests_waiting", "Requests that have not begun", waiting)
        rate = self._metrics.tokens_per_second()
        yield GaugeMetricFamily("moesaic_tokens_per_second", f"Tokens of answers over the last {WINDOW:.0f} s", rate)
        yield from self._experts()

    def _experts(self) -> Iterable[Metric]:
        counts = getattr(getattr(self._now.model, "expert_store", None), "counts", None)
        if counts is None:
            return
        found = {name: float(getattr(counts, name)) for name in EXPERTS if hasattr(counts, name)}
        for name, value in found.items():
            yield CounterMetricFamily(f"moesaic_experts_{name}", EXPERTS[name], value=value)
        needed = found.get("hits", 0.0) + found.get("misses", 0.0)
        share = found.get("hits", 0.0) / needed if needed else 0.0
        yield GaugeMetricFamily("moesaic_experts_hit_ratio", "Share of needed experts that were in fast memory", share)
