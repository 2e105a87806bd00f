"""The Mixture-of-Experts block that takes a dense FFN's place.

Shapes: T tokens, D hidden size, E routed experts, I neurons of one, K active experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..compat import experts_implementation
from ..models.families import GatedFFN
from ..models.moe_block import Routing
from ..routing.base import Gate, make_gate
from .experts import Experts, MoEConfig

SKIPPING = ("eager", "moesaic", "moesaic_triton", "moesaic_store")
"""Experts implementations that know an index of E as no expert; the others would run into it."""


class ExpertView(NamedTuple):
    """An expert's weights, as views, and the neurons of the dense FFN that it holds."""

    name: str
    neurons: Tensor
    gate_ID: Tensor
    up_ID: Tensor
    down_DI: Tensor


class SharedExperts(nn.Module):
    """The neurons that every token runs, a plain gated FFN; its down-projection may carry FLAP's bias."""

    def __init__(self, config: MoEConfig, act_fn: nn.Module) -> None:
        super().__init__()
        width, hidden = config.shared_expert_intermediate_size, config.hidden_size
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=config.shared_expert_bias)
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoE(nn.Module):
    """`shared_experts(x) + sum over the chosen experts`; either part may be absent."""

    def __init__(self, config: MoEConfig, act_fn: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.gate = make_gate(config) if config.num_experts else None
        self.experts = Experts(config, act_fn) if config.num_experts else None
        self.shared_experts = SharedExperts(config, act_fn) if config.shared_expert_intermediate_size else None
        if self.experts is not None and self.gate is not None and self.gate.selection.dynamic_top_k:
            self.experts.may_have_empty_slots = True

    @property
    def routed(self) -> tuple[Gate, Experts]:
        """Gate and experts of a block that has them."""
        assert self.gate is not None, "a block without routed experts has no gate"
        assert self.experts is not None
        return self.gate, self.experts

    @torch.no_grad()
    def load_dense(
        self, ffn: GatedFFN, shared: Tensor, experts_EI: Tensor, gate: dict[str, Tensor], bias_D: Tensor | None = None
    ) -> None:
        """Copy the dense FFN's neurons into the experts that own them, and the router's parameters into the gate.

        Args:
            ffn: the dense FFN.
            shared: neurons of the shared expert, int64.
            experts_EI: neurons of each routed expert, int64.
            gate: the router's parameters by name.
            bias_D: what the dropped neurons add on average; None: nothing.
        """
        for expert in self.parts(shared, experts_EI):
            expert.gate_ID.copy_(ffn.gate_FD[expert.neurons])
            expert.up_ID.copy_(ffn.up_FD[expert.neurons])
            expert.down_DI.copy_(ffn.down_DF[:, expert.neurons])
        if self.shared_experts is not None and bias_D is not None:
            self.shared_experts.down_proj.bias.copy_(bias_D)
        if self.gate is not None:
            for name, value in gate.items():
                self.gate.get_parameter(name).copy_(value)

    def parts(self, shared: Tensor, experts_EI: Tensor) -> Iterator[ExpertView]:
        """List the shared expert and each routed one, with the neurons of the dense FFN that are theirs."""
        if self.shared_experts is not None:
            e = self.shared_experts
            yield ExpertView("the shared expert", shared, e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight)
        if self.experts is not None:
            weights = zip(experts_EI, self.experts.gate_up_proj, self.experts.down_proj, strict=True)
            for number, (neurons_I, gate_up, down_DI) in enumerate(weights):
                gate_ID, up_ID = gate_up.chunk(2)
                yield ExpertView(f"expert {number}", neurons_I, gate_ID, up_ID, down_DI)

    def forward_all_experts(self, x_TD: Tensor) -> Tensor:
        """Add up all experts with weight 1, [T, D]: the dense FFN's output if the partition was a permutation."""
        parts = [self.shared_experts(x_TD)] if self.shared_experts is not None else []
        if self.experts is not None:
            index_TE = torch.arange(self.experts.num_experts, device=x_TD.device).expand(len(x_TD), -1)
            parts.append(self.experts(x_TD, index_TE, torch.ones_like(index_TE, dtype=x_TD.dtype)))
        return sum(parts[1:], parts[0])

    def forward(self, hidden_states: Tensor, routing: Routing | None = None) -> Tensor:
        """Run the block on [..., D]; a `routing` from outside takes the place of the gate's decision."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        parts = []
        if self.experts is not None and self.gate is not None:
            index_TK, weights_TK = routing or self.gate(hidden_TD, self.experts)
            if experts_implementation(self.config) not in SKIPPING:
                index_TK = index_TK.clamp(max=self.experts.num_experts - 1)  # of weight 0
            parts.append(self.experts(hidden_TD, index_TK, weights_TK))
        if self.shared_experts is not None:
            parts.append(self.shared_experts(hidden_TD))
        return sum(parts[1:], parts[0]).view_as(hidden_states)
