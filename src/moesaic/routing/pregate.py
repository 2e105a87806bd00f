"""One router ahead of the whole model, from token ids alone: Read-ME's (arXiv 2410.19123, §3).

Shapes: T tokens, N sequences, L tokens in one, D hidden size, G groups of layers, E routed experts, K slots for experts
in a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..calibration.activations import LayerActivations
from ..errors import InputError
from ..models.moe_block import Routing
from ..partition import Partition
from ._distil import Lesson, layer_target, teach
from ._network import PregateNetwork
from .base import DenseConfig, Gate, RoutedExperts, Router
from .selection.base import GateConfig


class PregateGate(Gate):
    """Reads what the network ahead of the model decided for its group of layers; has no weights of its own."""

    trainable_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.group = 0
        self.ahead: tuple[PregateNetwork, ...] = ()
        """The network; a tuple keeps it from becoming a submodule."""
        self.given_TK: Tensor | None = None
        self.place = 0

    def listen(self, network: PregateNetwork, group: int) -> None:
        """Take the decisions of one of a network's groups of layers."""
        self.ahead, self.group = (network,), group

    def follow(self, index_TK: Tensor | None) -> None:
        """Take decisions from here in turn, call by call, and from the start again after the last; None: no longer."""
        self.given_TK, self.place = index_TK, 0

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Choose experts by scores, int64 [T, K]."""
        return self.selection.select(scores_TE.float(), scores_TE, self)

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        logits_TGE = self.ahead[0].logits_TGE if self.ahead else None
        if logits_TGE is None:
            raise InputError(
                "the router ahead of the model has not seen these tokens; call the model with input_ids, or give "
                "decisions (model.pregate.decisions)"
            )
        return self._checked(logits_TGE[:, self.group], hidden_TD)

    def forward(self, hidden_TD: Tensor, experts: RoutedExperts) -> Routing:
        if self.given_TK is not None:
            end = self.place + len(hidden_TD)
            index_TK = self._checked(self.given_TK[self.place : end], hidden_TD)
            self.place = end % len(self.given_TK)
            return self.fixed(index_TK, hidden_TD.dtype)
        if not self.ahead:
            return super().forward(hidden_TD, experts)
        network = self.ahead[0]
        key = (self.group, id(self.selection), id(self.selection_parameters) if self.selection_parameters else 0)
        routing = network.routings.get(key)
        if not isinstance(routing, Routing):
            if network.given_TGK is not None:
                routing = self.fixed(network.given_TGK[:, self.group].to(hidden_TD.device), hidden_TD.dtype)
            else:
                routing = super().forward(hidden_TD, experts)
            network.routings[key] = routing
        self._checked(routing.top_k_index, hidden_TD)
        return routing

    def _checked(self, decided: Tensor, hidden_TD: Tensor) -> Tensor:
        if len(decided) != len(hidden_TD):
            raise InputError(f"the router ahead decided for {len(decided)} tokens, the block got {len(hidden_TD)}")
        return decided


@dataclass(frozen=True, kw_only=True)
class Pregate(Router):
    """One causal transformer layer on the token ids, with an embedding of its own, taught which experts a token needs.

    Its decision is for all layers, or one for each of `groups` groups of consecutive ones.
    """

    gate_class: ClassVar[type[Gate]] = PregateGate
    scope: ClassVar[Literal["layer", "model"]] = "model"

    groups: Annotated[int, Field(ge=0)] = 1
    """Groups of consecutive layers, each with a decision of its own; 1 is the paper's, 0 one for each layer."""
    width: Annotated[int, Field(ge=8)] = 512
    """Width of the router's network; the model's hidden size if that is less."""
    heads: Annotated[int, Field(gt=0)] = 4
    """Attention heads of its one layer."""
    importance: bool = False
    """Whether the teacher is each expert's share of `(h ‖Wd‖)²`, not the paper's graded overlap of top neurons."""
    signed: bool = False
    """Whether top neurons are those of largest h, as in Read-ME's code, not of largest `|h| ‖Wd‖`."""
    steps: Annotated[int, Field(gt=0)] = 300
    """Steps of AdamW, at most; they end when held-out calibration tokens gain nothing any more."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """AdamW's first learning rate."""
    batch: Annotated[int, Field(gt=0)] = 8
    """Sequences in a step."""

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        return {}

    def model_fields(self, config: DenseConfig) -> dict[str, int]:
        layers, heads = config.num_hidden_layers, self.heads
        if self.groups > layers:
            raise InputError(
                f"router 'pregate' has groups={self.groups}, the model {layers} layers; give 1 (one decision for all) "
                f"to {layers}, or 0 for one a layer"
            )
        step = 2 * heads
        width = min(self.width, config.hidden_size) // step * step
        if not width:
            raise InputError(f"router 'pregate': {heads} heads need a width of at least {step}; give fewer heads")
        return {"router_hidden_size": width, "pregate_groups": self.groups or layers, "pregate_heads": heads}

    def target(self, sample: LayerActivations, partition: Partition, active: int) -> Tensor:
        """Say what one layer teaches: a distribution over experts for each token, float32 [T, E]."""
        return layer_target(sample, partition.experts, active, importance=self.importance, signed=self.signed)

    def teach(self, network: PregateNetwork, tokens_NL: Tensor, target_NLGE: Tensor, seed: int) -> Lesson:
        """Train the network to say the layers' mean lesson; what is left is its best state on held-out tokens."""
        return teach(
            network, tokens_NL, target_NLGE, seed, steps=self.steps, learning_rate=self.learning_rate, batch=self.batch
        )


def group_of(layer: int, layers: int, groups: int) -> int:
    """Say to which of the groups of consecutive layers one belongs."""
    return layer * groups // layers


def connect_groups(network: PregateNetwork, gates: Sequence[Gate | None]) -> None:
    """Let each layer's gate read its group's decisions, and the network choose as each group's first gate does."""
    first: dict[int, PregateGate] = {}
    for layer, gate in enumerate(gates):
        if isinstance(gate, PregateGate):
            gate.listen(network, group_of(layer, len(gates), network.groups))
            first.setdefault(gate.group, gate)
    network.choosers = tuple(first[g] for g in sorted(first))


@torch.no_grad()
def network_from(config: GateConfig, embedding_UD: Tensor, seed: int) -> PregateNetwork:
    """Make a network that has learnt nothing yet; its embedding has the first channels of the model's."""
    network = PregateNetwork(config)  # pyrefly: ignore[bad-argument-type]
    network.start(seed)
    network.embed.copy_(embedding_UD[:, : network.embed.shape[1]])
    gates = [PregateGate(config) for _ in range(network.groups)]
    network.choosers = tuple(gates)
    return network.to(embedding_UD.device)
