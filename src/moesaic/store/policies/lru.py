"""The expert that was used longest ago leaves: what most engines do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...errors import InputError
from .base import Cache, CacheSize, ExpertKey, Future, Policy, ScannedCache


class LRUCache(ScannedCache):
    """One queue for all layers."""

    def choose(self, able: Iterator[ExpertKey], future: Future) -> ExpertKey:
        return next(able)


class LayerLRUCache(LRUCache):
    """A queue for each layer, all of one length; what is left over goes to the first layers."""

    def __init__(self, size: CacheSize) -> None:
        super().__init__(size)
        share, more = divmod(size.capacity, size.num_layers)
        if not share:
            raise InputError(
                f"lru:per_layer=True needs room for an expert of each of the {size.num_layers} layers, and there is "
                f"room for {size.capacity}; give more --expert-memory, or --cache look-ahead"
            )
        self.shares = [share + (layer < more) for layer in range(size.num_layers)]
        self.held = [0] * size.num_layers

    def admit(self, key: ExpertKey) -> None:
        super().admit(key)
        self.held[key.layer] += 1

    def evict(self, key: ExpertKey) -> None:
        super().evict(key)
        self.held[key.layer] -= 1

    def full(self, incoming: ExpertKey) -> bool:
        return self.held[incoming.layer] >= self.shares[incoming.layer]

    def candidates(self, incoming: ExpertKey) -> Iterable[ExpertKey]:
        return (key for key in self.resident if key.layer == incoming.layer)


@dataclass(frozen=True, kw_only=True)
class LRU(Policy):
    """Least recently used, over all layers or each layer for itself.

    Over all layers it keeps nothing at all where less fits than one token uses in all layers: each expert leaves just
    before it is used again.
    """

    per_layer: bool = False
    """Whether each layer has its own share of the fast tier."""

    def cache(self, size: CacheSize) -> Cache:
        return LayerLRUCache(size) if self.per_layer else LRUCache(size)
