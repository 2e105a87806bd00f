"""Read-ME's tuning (arXiv 2410.19123, §4): the router ahead of the model and the experts learn in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError
from ...models.families import decoder_layers, ffn_name
from ...moe.ahead import network_of
from ...moe.block import MoE
from ...moe.modeling import moe_blocks
from ...routing._distil import distillation_loss, expert_target
from ...routing.pregate import group_of
from ..locality import locality_loss
from ..schedule import schedule
from .base import RouterStep
from .full import Full


@dataclass(frozen=True, kw_only=True)
class ReadMe(Full):
    """In each round first the router learns which experts hold a token's top neurons, then all layers by the objective.

    While the router learns, its teacher is the dense model's own stream, seen through the experts' present weights;
    while the experts learn, the router is frozen and its best expert runs. Rates fall by a fifth each round.
    """

    learning_rate: ClassVar[float] = 5e-5
    router_learning_rate: ClassVar[float] = 5e-4
    needs_dense: ClassVar[bool] = True
    alternates: ClassVar[bool] = True
    shards: ClassVar[bool] = False

    rounds: Annotated[int, Field(gt=0)] = 4
    """The paper has 8, its code 5."""
    router_share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    """Share of a round's steps that trains the router (100 of 300)."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Factor of the learning rates from round to round."""
    importance: bool = False
    """Whether the teacher is each expert's share of `(h ‖Wd‖)²`, not the paper's graded overlap of top neurons."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        if network_of(model) is None:
            router = model.config.get_text_config().router
            raise InputError(
                f"--method read-me trains a router ahead of the model, and this one's, {router}, is in "
                "each layer; convert with --partition paths --router pregate, or take another --method"
            )
        return super().prepare(model)

    def place(self, progress: float) -> tuple[int, float]:
        """Say which round it is, and which share of it is over."""
        place = min(progress, 1 - 1e-9) * self.rounds
        return int(place), place - int(place)

    def router_alone(self, progress: float) -> bool:
        return self.place(progress)[1] < self.router_share - 1e-6

    def rate(self, progress: float, warmup: float) -> float:
        number, over = self.place(progress)
        router = self.router_alone(progress)
        part = over / self.router_share if router else max(0.0, over - self.router_share) / (1 - self.router_share)
        return self.decay**number * schedule(part, warmup)

    def router_step(
        self, model: PreTrainedModel, tokens_ML: Tensor, dense: PreTrainedModel, locality: float
    ) -> RouterStep:
        network = network_of(model)
        assert network is not None
        target_TGE = targets(model, tokens_ML, dense, network.groups, importance=self.importance)
        place_1L = torch.arange(tokens_ML.shape[1], device=tokens_ML.device)[None]
        logits_TGE = network(tokens_ML, place_1L).flatten(0, 1)
        index_TGK = network.choose(logits_TGE.detach())
        loss = distillation_loss(logits_TGE, target_TGE)
        if locality:
            for group in range(network.groups):
                near = locality_loss(logits_TGE[:, group], index_TGK[:, group], tokens_ML.shape[1])
                loss = loss + locality * near
        layers = len(moe_blocks(model))
        chosen = [index_TGK[:, group_of(layer, layers, network.groups)] for layer in range(layers)]
        return RouterStep(loss / network.groups, chosen)


@torch.no_grad()
def targets(
    model: PreTrainedModel, tokens_ML: Tensor, dense: PreTrainedModel, groups: int, *, importance: bool
) -> Tensor:
    """Say which experts the tokens need, by groups of layers, as the dense model's stream shows it, [T, G, E].

    What enters a dense FFN goes through all experts of the converted layer; their neurons are what is ranked.
    """
    blocks = moe_blocks(model)
    found: list[Tensor] = []

    def hook(block: MoE) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(ffn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(block_target(block, inputs[0].flatten(0, -2), importance=importance))

        return see

    with ExitStack() as stack:
        for layer, block in zip(decoder_layers(dense), blocks, strict=True):
            handle = layer.get_submodule(ffn_name(layer)).register_forward_pre_hook(hook(block))
            stack.callback(handle.remove)
        dense(input_ids=tokens_ML, use_cache=False)
    target_TGE = torch.zeros(tokens_ML.numel(), groups, found[0].shape[1], device=tokens_ML.device)
    for layer, layer_target_TE in enumerate(found):
        target_TGE[:, group_of(layer, len(blocks), groups)] += layer_target_TE
    return target_TGE / target_TGE.sum(-1, keepdim=True)


def block_target(block: MoE, x_TD: Tensor, *, importance: bool) -> Tensor:
    """Say which of a block's experts hold the top neurons of the tokens that enter it, of all experts' ones, [T, E]."""
    gate, experts = block.routed
    norm_EI = experts.down_proj.float().norm(dim=1)
    x_TD = x_TD.to(experts.gate_up_proj.dtype)
    value_TF = torch.cat(
        [experts.hidden(x_TD, e).float().abs() * norm_EI[e] for e in range(experts.num_experts)], dim=1
    )
    neurons_EI = torch.arange(value_TF.shape[1], device=value_TF.device).view(experts.num_experts, -1)
    return expert_target(value_TF, neurons_EI, gate.num_experts_per_tok, importance=importance)
