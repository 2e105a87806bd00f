"""Which experts a request's next tokens run, as far as it can be known before they run: its signature.

Shapes: T tokens, D hidden size, K slots for experts in a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ...errors import InputError
from ...models.moe_block import Routing, find_blocks
from ...moe.ahead import network_of
from ...routing._network import PregateNetwork
from ...store.opening import store_of
from ...store.predict import listen


class Request(Protocol):
    """transformers' `RequestState`, as far as it is used here."""

    request_id: str
    initial_tokens: list[int]
    generated_tokens: list[int]
    position_offset: int


class Part(NamedTuple):
    """A request's tokens in a batch, where all are in one row."""

    request_id: str
    tokens: int
    prefill: bool
    request: Request


class Signatures(Protocol):
    """Knows signatures."""

    def experts(self, request: Request, tokens: int) -> frozenset[int]:
        """Tell which experts the request's next tokens run; an empty set if nothing is known."""
        ...

    def scheduled(self, parts: Sequence[Part], waiting: Sequence[Part] = ()) -> None:
        """Hear which tokens make the next batch, in their order, and which wait for a later one."""
        ...

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        ...

    def resident(self) -> frozenset[int]:
        """Tell which experts are in fast memory, numbered as signatures are."""
        ...

    def most(self) -> int | None:
        """Tell how many distinct experts, as signatures number them, a batch is kept within; None: any number."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...


class PregateSignatures:
    """The experts that a router ahead of the backbone has chosen for the very tokens, each group of layers its own.

    The model then runs by these decisions: the router is asked once for each token, as soon as the token is known.
    """

    def __init__(self, model: PreTrainedModel, network: PregateNetwork) -> None:
        self.network = network
        gates = [getattr(block.router, "group", 0) for block in find_blocks(model)]
        self._routed: dict[str, Tensor] = {}
        self._waiting: list[Tensor] = []
        self._stored = [block.experts for block in find_blocks(model)]
        self._store = store_of(model)
        self._first = [gates.index(group) for group in range(network.groups)]
        for experts in self._stored:
            listen(experts, lambda: self._waiting)

    def _routes(self, request: Request) -> Tensor:
        """Decide for all tokens of a request that are known, int64 [tokens, groups, K]; each token once."""
        name, known = request.request_id, [*request.initial_tokens, *request.generated_tokens]
        before = self._routed.get(name)
        seen = 0 if before is None else len(before)
        if before is None or len(known) > seen:
            more = self.network.route_tokens(name, known[seen:])
            self._routed[name] = before = more if before is None else join(before, more, self.network.num_experts)
        return before

    def _next(self, part: Part) -> Tensor:
        start = part.request.position_offset
        return self._routes(part.request)[start : start + part.tokens]

    def experts(self, request: Request, tokens: int) -> frozenset[int]:
        index_TGK = self._next(Part(request.request_id, tokens, False, request))
        count = self.network.num_experts
        offset_G1 = count * torch.arange(self.network.groups, device=index_TGK.device)[:, None]
        return frozenset((index_TGK + offset_G1)[index_TGK < count].unique().tolist())

    def scheduled(self, parts: Sequence[Part], waiting: Sequence[Part] = ()) -> None:
        routes = [self._next(part) for part in parts]
        together = routes[0]
        for more in routes[1:]:
            together = join(together, more, self.network.num_experts)
        self._waiting = [route for part in waiting if len(route := self._next(part))]
        self.network.given_TGK = together
        self.network.routings.clear()

    def resident(self) -> frozenset[int]:
        if self._store is None:
            return frozenset()
        held = (self._store.resident(layer) for layer in self._first)  # its other layers follow the same decisions
        return frozenset(group * self.network.num_experts + e for group, part in enumerate(held) for e in part)

    def most(self) -> int | None:
        if self._store is None:
            return None
        return max(1, self._store.size.capacity * self.network.groups // self._store.size.num_layers)

    def forget(self, request_id: str) -> None:
        self._routed.pop(request_id, None)
        self.network.forget(request_id)

    def close(self) -> None:
        for name in list(self._routed):
            self.forget(name)
        self.network.given_TGK = None
        self.network.routings.clear()
        for experts in self._stored:
            listen(experts, tuple)


def join(before: Tensor, more: Tensor, none: int) -> Tensor:
    """Join decisions [T, G, K] whose numbers of slots may differ; `none` fills the slots that one has less."""
    most = max(before.shape[2], more.shape[2])
    return torch.cat([pad(part, (0, most - part.shape[2]), value=none) for part in (before, more)])


class PrefillSignatures:
    """The experts that a request's prefill ran more often than an even load would, layer by layer (ELDR)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._blocks = find_blocks(model)
        self._store = store_of(model)
        self._parts: Sequence[Part] = ()
        self._counts: dict[str, list[Tensor]] = {}
        self._known: dict[str, frozenset[int]] = {}
        self._handles = [block.watch(self._count(number)) for number, block in enumerate(self._blocks)]

    def experts(self, request: Request, tokens: int) -> frozenset[int]:
        name = request.request_id
        if name not in self._known and name in self._counts:
            self._known[name] = often(self._counts[name])
        return self._known.get(name, frozenset())

    def scheduled(self, parts: Sequence[Part], waiting: Sequence[Part] = ()) -> None:
        self._parts = parts if any(part.prefill for part in parts) else ()

    def forget(self, request_id: str) -> None:
        self._counts.pop(request_id, None)
        self._known.pop(request_id, None)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def resident(self) -> frozenset[int]:
        if self._store is None:
            return frozenset()
        sizes = [block.num_experts for block in self._blocks]
        offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        return frozenset(offset + e for number, offset in enumerate(offsets) for e in self._store.resident(number))

    def most(self) -> int | None:
        return None  # what a prefill ran often is a guess at what its next tokens run: too little to keep any back

    def _count(self, number: int) -> Callable[[Tensor, Routing], None]:
        experts = self._blocks[number].num_experts

        def see(hidden_TD: Tensor, routing: Routing) -> None:
            if len(hidden_TD) != sum(part.tokens for part in self._parts):  # also of a call that is no batch
                return
            start = 0
            for part in self._parts:
                if part.prefill:
                    index_TK = routing.top_k_index[start : start + part.tokens]
                    count = torch.bincount(index_TK.flatten(), minlength=experts + 1)[:experts].cpu()
                    self._add(part.request_id, number, count)
                start += part.tokens

        return see

    def _add(self, request_id: str, number: int, count: Tensor) -> None:
        if request_id not in self._counts:
            sizes = [block.num_experts for block in self._blocks]
            self._counts[request_id] = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        self._counts[request_id][number] += count
        self._known.pop(request_id, None)


def often(counts: Sequence[Tensor]) -> frozenset[int]:
    """List the experts above an even load, of all layers, numbered one layer after the other."""
    found, offset = [], 0
    for count in counts:
        found += [offset + expert for expert in (count > count.float().mean()).nonzero().flatten().tolist()]
        offset += len(count)
    return frozenset(found)


def signatures_of(model: PreTrainedModel, *, needed: bool = True) -> Signatures | None:
    """Choose how a model's signatures are known: by its router ahead of the backbone, else by its prefills.

    Args:
        model: dense or a Mixture-of-Experts.
        needed: whether the scheduler orders by them; else only a router ahead needs to be told of batches.

    Raises:
        InputError: they are needed, and the model is dense.
    """
    network = network_of(model)
    if network is not None:
        return PregateSignatures(model, network)
    if not needed:
        return None
    if not find_blocks(model):
        raise InputError(
            f"--scheduler expert-aware orders requests by expert, and '{model.config.model_type}' is dense; "
            "use --scheduler fifo"
        )
    return PrefillSignatures(model)
