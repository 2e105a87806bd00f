"""How many uses of experts find theirs in memory, by policy and size: what to give `--expert-memory`."""

from __future__ import annotations

import torch

from .. import registry
from ..progress import Progress
from ..results import CacheHits
from .memory import expert_memory_bytes
from .policies.base import CacheSize
from .replay import replay
from .routes import DECODE, RouteTrace, layer_steps

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)
"""Of all experts."""
POLICIES = ("look-ahead", "lru", "belady")
"""The store's default, what others have, and the most that is possible."""
IN_FLIGHT = 2
"""Experts that load at once, as in the store."""
UNKNOWN = 2**20
"""Bytes of an expert where a trace does not say; any large number."""
STEPS = 8_192
"""Layer steps that are replayed at most: large models take a while for each."""


def cache_hits(trace: RouteTrace, progress: Progress | None = None) -> list[CacheHits]:
    """Replay a trace's decoding, one request at a time, with room for some shares of all experts.

    `hit_ratio[policy] = replay(steps, policy, capacity).hit_ratio`. Shares that do not hold the experts of one token in
    one layer are left out, as are all of a trace without decoding.

    Args:
        trace: what a model used.
        progress: called with (finished, all) simulations, and what they are.
    """
    most = max(1, STEPS // trace.num_layers)
    passes = [each for request in trace.passes() for each in request if each.phase == DECODE][:most]
    steps = layer_steps(passes)
    if not steps:
        return []
    uses = sum(len(step.experts) for step in steps) / len(passes)
    experts, least = trace.num_layers * trace.num_experts, max(len(step.experts) for step in steps)
    one = trace.expert_bytes or UNKNOWN
    shares = {share: expert_memory_bytes(f"{share:.0%}", one * experts, torch.device("cpu")) // one for share in SHARES}
    sizes = [(share, capacity) for share, capacity in shares.items() if capacity >= least]
    found, done = [], 0
    for share, capacity in sizes:
        size, ratios = CacheSize(capacity, trace.num_layers, trace.num_experts), {}
        for name in POLICIES:
            ratios[name] = replay(steps, registry.build("cache", name), size, in_flight=IN_FLIGHT).hit_ratio
            done += 1
            if progress:
                progress(done, len(sizes) * len(POLICIES), "caches, simulated")
        read = round(uses * (1 - ratios[POLICIES[0]]) * trace.expert_bytes) if trace.expert_bytes else None
        found.append(CacheHits(share=share, capacity=capacity, hit_ratio=ratios, bytes_read_per_token=read))
    return found
