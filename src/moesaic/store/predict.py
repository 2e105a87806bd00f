"""What later layers will need: known, where a router ahead of the model has decided; else asked of the next router.

Layers change a token little, so the next router's answer to this layer's input is right for most of the experts
(Eliseev and Mazur 2023, arXiv 2312.17238, §3.3): they are read while this layer runs. A router ahead of the model knows
every layer of this pass, and those of tokens that wait for the next ones (Read-ME, arXiv 2410.19123, §4).

Shapes: T tokens, D hidden size, G groups of layers, K slots for experts in a token.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.moe_block import MoEBlock, read_routing
from ..moe.ahead import network_of
from ..routing._network import PregateNetwork
from ..routing.base import Gate
from ..routing.pregate import PregateGate
from .policies.base import ExpertKey, Future
from .store import Expert, ExpertStore

MOST_EARLY = 0.5
"""Of the fast tier that experts take which nobody has asked for yet."""


class Forecast(NamedTuple):
    """What is known, or believed, of the experts that are needed next."""

    keys: list[ExpertKey]
    """The sooner needed the earlier."""
    future: Future


Predictor = Callable[[int, Tensor], Forecast]
"""Called with a layer and what enters its experts, [T, D]."""


def nothing_ahead(layer: int, hidden_TD: Tensor) -> Forecast:
    """Know nothing."""
    return Forecast([], lambda key: math.inf)


def most_used(index: Tensor, num_experts: int) -> list[int]:
    """List the experts that tokens use, those that most of them use first."""
    counts = Counter(index.flatten().tolist())
    return [expert for expert, _ in counts.most_common() if expert < num_experts]


class NextRouter:
    """Asks each layer's router one layer early.

    Args:
        blocks: the model's.
    """

    def __init__(self, blocks: Sequence[MoEBlock]) -> None:
        self.blocks = blocks
        self.takes = [len(inspect.signature(block.router.forward).parameters) for block in blocks]
        first = blocks[0].router
        self.able = not (isinstance(first, Gate) and first.first_layer_names)  # those remember what they were asked

    def __call__(self, layer: int, hidden_TD: Tensor) -> Forecast:
        if not self.able or layer + 1 >= len(self.blocks):
            return nothing_ahead(layer, hidden_TD)
        block = self.blocks[layer + 1]
        # not through `__call__`: whoever watches the router would take it for a token that runs
        routing = read_routing(block.router.forward(*(hidden_TD, block.experts)[: self.takes[layer + 1]]))
        index_P = routing.top_k_index[routing.runs(block.num_experts)]
        keys = [ExpertKey(layer + 1, expert) for expert in most_used(index_P, block.num_experts)]
        soon = set(keys)
        return Forecast(keys, lambda key: 1.0 if key in soon else math.inf)


class RoutedAhead:
    """Reads what a router ahead of the model decided.

    Args:
        network: the router.
        groups: of each layer that has experts, the group whose decision it takes.
    """

    def __init__(self, network: PregateNetwork, groups: Sequence[int]) -> None:
        self.network, self.groups = network, groups
        self.queue: Callable[[], Sequence[Tensor]] = tuple
        """Decisions for the passes after this one in their expected order, each [T, G, K]; whoever batches says it."""
        self._seen: Tensor | None = None
        self._passes: list[list[list[int]]] = []
        self._sets: list[list[set[int]]] = []

    def __call__(self, layer: int, hidden_TD: Tensor) -> Forecast:
        self._look()
        layers = len(self.groups)
        now = self._passes[0] if self._passes else [[]] * self.network.groups
        keys = [ExpertKey(m, e) for m in range(layer + 1, layers) for e in now[self.groups[m]]]
        sets = self._sets

        def future(key: ExpertKey) -> float:
            group = self.groups[key.layer]
            for number, each in enumerate(sets):
                if key.expert in each[group] and (number or key.layer > layer):
                    return number * layers + key.layer - layer
            return math.inf

        return Forecast(keys, future)

    def _look(self) -> None:
        """Gather the experts of this pass and of those that wait, once a pass."""
        decided = self.network.decided_TGK()
        if decided is self._seen:
            return
        self._seen = decided
        passes = () if decided is None else (decided, *self.queue())
        self._passes = [self._experts(index_TGK) for index_TGK in passes]
        self._sets = [[set(experts) for experts in each] for each in self._passes]

    def _experts(self, index_TGK: Tensor) -> list[list[int]]:
        """List each group's experts, those that most tokens use first."""
        return [most_used(index_TK, self.network.num_experts) for index_TK in index_TGK.unbind(1)]


def predictor_of(model: PreTrainedModel, blocks: Sequence[MoEBlock], *, prefetch: bool) -> Predictor:
    """Choose what knows most of a model's next experts; a guess is of no use where nothing is read early."""
    network = network_of(model)
    gates = [block.router for block in blocks]
    if network is not None and all(isinstance(gate, PregateGate) for gate in gates):
        return RoutedAhead(network, [gate.group for gate in gates if isinstance(gate, PregateGate)])
    return NextRouter(blocks) if prefetch else nothing_ahead


class StoredBlock:
    """One layer's experts in a store.

    Args:
        store: of the whole model.
        layer: of the layers that have experts.
        predictor: what is asked for ahead of time.
        prefetch: whether what it says is read early, and not only kept.
    """

    def __init__(self, store: ExpertStore, layer: int, predictor: Predictor, *, prefetch: bool) -> None:
        self.store, self.layer, self.predictor, self.prefetch = store, layer, predictor, prefetch

    def visit(self, experts: Sequence[int], hidden_TD: Tensor) -> Iterator[Expert]:
        """Give the layer's experts in turn, and have the next layer's read meanwhile."""
        if self.store.holds_all():
            return self.store.visit(self.layer, experts)
        with torch.no_grad():
            ahead = self.predictor(self.layer, hidden_TD)
        most = int(MOST_EARLY * self.store.size.capacity)

        def meanwhile() -> None:
            self.store.prefetch(ahead.keys[:most], ahead.future)

        return self.store.visit(self.layer, experts, ahead.future, meanwhile if self.prefetch else None)


VIEW = "stored_block"
"""The attribute of an experts module that says where its weights are."""


def listen(experts: nn.Module, queue: Callable[[], Sequence[Tensor]]) -> None:
    """Let a layer's experts hear what waits for later passes, if they are in a store and a router ahead decides."""
    block = getattr(experts, VIEW, None)
    if isinstance(block, StoredBlock) and isinstance(block.predictor, RoutedAhead):
        block.predictor.queue = queue
