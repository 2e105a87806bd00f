"""The Mixture-of-Experts block that takes a dense FFN's place.

Shapes: T tokens, D hidden size, E routed experts, I neurons of one, K active experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations import use_experts_implementation

from .families import GatedFFN
from .gates import GATES, Gate, GateConfig

SKIPPING = ("eager", "moesaic", "moesaic_triton")
"""Experts implementations that know an index of E as no expert; the others would run into it."""


class MoEConfig(GateConfig):
    """What the block needs to know of a model's configuration."""

    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    shared_expert_bias: bool
    router: str


@use_experts_implementation
class Experts(nn.Module):
    """Routed experts as 3-D weights; transformers' experts interface swaps this naive forward for a fast one."""

    def __init__(self, config: MoEConfig, act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = act_fn

    def hidden(self, x_TD: Tensor, expert: int) -> Tensor:
        """Activations of one expert's neurons, shape [T, I]."""
        gate_TI, up_TI = linear(x_TD, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.act_fn(gate_TI) * up_TI

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`y_t = sum_k weight_tk * expert_{index_tk}(x_t)`, shape [T, D]; indices from E on stand for no expert."""
        output_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            out = linear(self.hidden(hidden_states[token], expert), self.down_proj[expert])
            output_TD.index_add_(0, token, out * top_k_weights[token, slot, None])
        return output_TD

    def output_norms(self, x_TD: Tensor) -> Tensor:
        """`‖h_e Wd_e‖` of every expert, shape [T, E], float32."""
        outputs = (linear(self.hidden(x_TD, e), self.down_proj[e]) for e in range(self.num_experts))
        return torch.stack([out.float().norm(dim=-1) for out in outputs], dim=-1)


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
        self.config: Any = config
        self.gate = GATES[config.router](config) if config.num_experts else None
        self.experts = Experts(config, act_fn) if config.num_experts else None
        self.shared_experts = SharedExperts(config, act_fn) if config.shared_expert_intermediate_size else None

    @property
    def routed(self) -> tuple[Gate, Experts]:
        """Gate and experts of a block that has them."""
        assert self.gate is not None, "a block without routed experts has no gate"
        assert self.experts is not None
        return self.gate, self.experts

    @torch.no_grad()
    def fill(
        self, ffn: GatedFFN, shared: Tensor, experts_EI: Tensor, gate: dict[str, Tensor], bias_D: Tensor | None = None
    ) -> None:
        """Copy the dense FFN's neurons into the experts that own them, and the router's parameters into the gate."""
        for _, neurons, (gate_ID, up_ID, down_DI) in self.parts(shared, experts_EI):
            gate_ID.copy_(ffn.gate_FD[neurons])
            up_ID.copy_(ffn.up_FD[neurons])
            down_DI.copy_(ffn.down_DF[:, neurons])
        if self.shared_experts is not None and bias_D is not None:
            self.shared_experts.down_proj.bias.copy_(bias_D)
        if self.gate is not None:
            for name, value in gate.items():
                self.gate.get_parameter(name).copy_(value)

    def parts(self, shared: Tensor, experts_EI: Tensor) -> Iterator[tuple[str, Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """(name, its neurons, (gate [I, D], up [I, D], down [D, I])) of the shared expert and each routed one."""
        if self.shared_experts is not None:
            e = self.shared_experts
            yield "the shared expert", shared, (e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight)
        if self.experts is not None:
            weights = zip(experts_EI, self.experts.gate_up_proj, self.experts.down_proj, strict=True)
            for number, (neurons_I, gate_up, down_DI) in enumerate(weights):
                gate_ID, up_ID = gate_up.chunk(2)
                yield f"expert {number}", neurons_I, (gate_ID, up_ID, down_DI)

    def all_on(self, x_TD: Tensor) -> Tensor:
        """The sum of all experts with weight 1: the dense FFN's output if the partition was a permutation."""
        parts = [self.shared_experts(x_TD)] if self.shared_experts is not None else []
        if self.experts is not None:
            index_TE = torch.arange(self.experts.num_experts, device=x_TD.device).expand(len(x_TD), -1)
            parts.append(self.experts(x_TD, index_TE, torch.ones_like(index_TE, dtype=x_TD.dtype)))
        return sum(parts[1:], parts[0])

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        parts = []
        if self.experts is not None and self.gate is not None:
            index_TK, weights_TK = self.gate(hidden_TD, self.experts)
            if self.gate.varies and self.config._experts_implementation not in SKIPPING:
                index_TK = index_TK.clamp(max=self.experts.num_experts - 1)  # of weight 0
            parts.append(self.experts(hidden_TD, index_TK, weights_TK))
        if self.shared_experts is not None:
            parts.append(self.shared_experts(hidden_TD))
        return sum(parts[1:], parts[0]).view_as(hidden_states)
