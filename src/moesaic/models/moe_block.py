"""The Mixture-of-Experts block of any model, ours or of stock transformers, seen in one way.

A block is known by its structure: a module with a child that holds the experts' weights in 3-D (`gate_up_proj`,
`down_proj`) and a child that scores them, a router with a `weight` of [num_experts, hidden_size]. Mixtral, Qwen2-MoE,
Qwen3-MoE, OLMoE, GLM-4-MoE, Granite-MoE (shared or not), DeepSeek-V2 and V3, Phi-MoE, FlexOlmo, gpt-oss and Llama-4
(text) are such, and so is moesaic's own.

Shapes: T tokens, D hidden size, E routed experts, I neurons of one, K slots for experts in a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from .families import decoder_layers

PROBE_TOKENS = 8
SHARED = ("shared_experts", "shared_expert", "shared_mlp")


class Routing(NamedTuple):
    """Which experts run for each token, and the factors on their outputs."""

    top_k_index: Tensor
    """Experts, int64 [T, K]; the number of experts stands for no expert."""
    top_k_weights: Tensor
    """[T, K]; 0 where there is no expert."""

    def runs(self, num_experts: int) -> Tensor:
        """Tell which slots run an expert, bool [T, K]."""
        return (self.top_k_index < num_experts) & (self.top_k_weights != 0)

    def weights_of_all(self, num_experts: int) -> Tensor:
        """Write the decision as the weights of all experts, 0 where they do not run, float32 [T, E]."""
        none_TE = self.top_k_weights.new_zeros(len(self.top_k_index), num_experts + 1, dtype=torch.float32)
        return none_TE.scatter(1, self.top_k_index, self.top_k_weights.float())[:, :-1]


def count_load(index_TK: Tensor, num_experts: int) -> Tensor:
    """Count the tokens that chose each expert, int64 [E]; indices from E on stand for none."""
    return torch.bincount(index_TK.flatten(), minlength=num_experts + 1)[:num_experts]


Decide = Callable[[Tensor], Routing]
"""A routing decision for the tokens [T, D] that enter a block."""


@dataclass(frozen=True)
class MoEBlock:
    """One layer's Mixture-of-Experts; a view, so changing a weight of `experts` changes the model."""

    module: nn.Module
    """What the decoder layer calls."""
    router: nn.Module
    experts: nn.Module
    shared_experts: nn.Module | None = None
    """What every token runs beside the routed experts; in Granite it is the decoder layer's, not the block's."""
    layer: int = 0
    names: dict[str, str] = field(default_factory=dict)
    """Where the parts are, from the decoder layer: `module`, `router`, `experts`."""

    @property
    def num_experts(self) -> int:
        """Routed experts."""
        return self.down_proj.shape[0]

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts that the router takes for a token, if it takes a fixed number."""
        found = getattr(self.router, "num_experts_per_tok", None) or getattr(self.router, "top_k", None)
        assert isinstance(found, int), f"{type(self.router).__name__} does not say how many experts it takes"
        return found

    @property
    def hidden_size(self) -> int:
        """Channels of what enters and leaves the block."""
        return self.down_proj.shape[2] if self.is_transposed else self.down_proj.shape[1]

    @property
    def moe_intermediate_size(self) -> int:
        """Neurons of one routed expert."""
        return self.down_proj.shape[1] if self.is_transposed else self.down_proj.shape[2]

    @property
    def down_proj(self) -> Tensor:
        """The experts' down-projections, [E, D, I], or [E, I, D] where they are transposed."""
        return self.experts.get_parameter("down_proj")

    @property
    def is_transposed(self) -> bool:
        """Whether the experts multiply from the right, as gpt-oss's and Llama-4's do: [E, I, D]."""
        gate_up, down = (self.experts.get_parameter(name).shape for name in ("gate_up_proj", "down_proj"))
        return gate_up[2] == 2 * down[1] and gate_up[1] == down[2]

    @torch.no_grad()
    def norm_topk_prob(self) -> bool:
        """Tell whether weights are renormalised: whether an expert's weight depends on how many others are chosen.

        Equals `router.norm_topk_prob` where the router has it; else random tokens are routed to another number too.
        """
        said = getattr(self.router, "norm_topk_prob", None)
        if isinstance(said, bool):
            return said
        weight, chosen = next(self.router.parameters()), self.num_experts_per_tok
        x_TD = torch.randn(PROBE_TOKENS, self.hidden_size, generator=torch.Generator().manual_seed(0))
        x_TD = x_TD.to(weight.device, weight.dtype)
        few_TE = self.route(x_TD).weights_of_all(self.num_experts)
        name = "top_k" if hasattr(self.router, "top_k") else "num_experts_per_tok"
        setattr(self.router, name, chosen - 1 if chosen > 1 else 2)
        try:
            many_TE = self.route(x_TD).weights_of_all(self.num_experts)
        except AssertionError:  # Phi-MoE's router knows two experts only, and weighs each for itself
            return False
        finally:
            setattr(self.router, name, chosen)
        both_TE = (few_TE > 0) & (many_TE > 0)
        return not torch.allclose(few_TE[both_TE], many_TE[both_TE], rtol=0.01)

    def route(self, hidden_TD: Tensor) -> Routing:
        """Ask the router alone which experts the tokens [T, D] that enter the block would run."""
        arguments = (hidden_TD, self.experts)[: len(inspect.signature(self.router.forward).parameters)]
        return read_routing(self.router(*arguments))  # moesaic's own may look at the experts

    def watch(self, see: Callable[[Tensor, Routing], None]) -> torch.utils.hooks.RemovableHandle:
        """Have `see` called with what enters the router, [T, D], and its decision, until the handle is removed."""

        def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            see(inputs[0].flatten(0, -2), read_routing(output))

        return self.router.register_forward_hook(hook)

    @contextmanager
    def routed_by(self, decide: Decide | Routing) -> Iterator[None]:
        """Let a decision from outside take the place of the router's: for all tokens of each call of the block.

        Args:
            decide: the decision, or what makes it of the tokens [T, D] that enter the block.

        Raises:
            InputError: on a call of the block whose tokens are not as many as the decision's.
        """

        def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden_TD = inputs[0].flatten(0, -2)
            routing = decide if isinstance(decide, Routing) else decide(hidden_TD)
            if len(routing.top_k_index) != len(hidden_TD):
                raise InputError(
                    f"the decision is for {len(routing.top_k_index)} tokens, the block got {len(hidden_TD)}"
                )
            return write_routing(routing, output)

        handle = self.router.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def routing_groups(router: nn.Module) -> int:
    """Count the groups of experts that a stock router chooses among first, as DeepSeek's do; 1 without them."""
    greedy = getattr(router, "topk_method", "") == "greedy"  # DeepSeek-V2's, which has groups and looks at none
    return 1 if greedy else int(getattr(router, "num_group", None) or 1)


def read_routing(output: tuple[Tensor, ...]) -> Routing:
    """Read a router's output: `Routing`, (logits, weights, index) of stock routers, or Llama-4's scores of all E."""
    if isinstance(output, Routing):
        return output
    if len(output) == 3:
        _, weights, index = output
        return Routing(index, weights)
    scores_TE, logits_TE = output  # sigmoid of the chosen experts' logits, 0 elsewhere
    count = int((scores_TE > 0).sum(-1).max())
    index = logits_TE.topk(count, dim=-1).indices
    return Routing(index, scores_TE.gather(-1, index))


def write_routing(routing: Routing, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Write a decision as the router's own output has it; the inverse of `read_routing`."""
    index, weights = routing
    if isinstance(output, Routing):
        return routing
    if len(output) == 3:
        return output[0], weights.to(output[1].dtype), index
    scores_TE, logits_TE = output
    zeros = torch.zeros(len(scores_TE), scores_TE.shape[1] + 1, dtype=scores_TE.dtype, device=scores_TE.device)
    return zeros.scatter(1, index, weights.to(scores_TE.dtype))[:, :-1], logits_TE


def find_block(layer: nn.Module, number: int = 0) -> MoEBlock | None:
    """Find the Mixture-of-Experts of a decoder layer; None if the layer is dense."""
    for name, module in layer.named_modules():
        children = dict(module.named_children())
        experts = next((child for child in children.items() if _holds_experts(child[1])), None)
        if experts is None:
            continue
        count = experts[1].get_parameter("down_proj").shape[0]
        router = next((child for child in children.items() if _scores(child[1], count)), None)
        if router is None:
            continue
        beside = (getattr(holder, shared, None) for holder in (module, layer) for shared in SHARED)
        prefix = f"{name}." if name else ""
        return MoEBlock(
            module, router[1], experts[1], next((found for found in beside if isinstance(found, nn.Module)), None),
            number, {"module": name, "router": prefix + router[0], "experts": prefix + experts[0]},
        )  # fmt: skip
    return None


def _holds_experts(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return all(name in own and own[name].ndim == 3 for name in ("gate_up_proj", "down_proj"))


def _scores(module: nn.Module, num_experts: int) -> bool:
    if getattr(module, "num_experts_per_tok", None) is None and getattr(module, "top_k", None) is None:
        return False
    return any(num_experts in p.shape for p in module.parameters())


def find_blocks(model: PreTrainedModel) -> list[MoEBlock]:
    """Find the Mixture-of-Experts of each decoder layer that has one, in order.

    Raises:
        InputError: the model is not one stack of decoder layers.
    """
    found = (find_block(layer, number) for number, layer in enumerate(decoder_layers(model)))
    return [block for block in found if block is not None]


@contextmanager
def routed_by(blocks: Sequence[MoEBlock], decisions: Sequence[Decide | Routing]) -> Iterator[None]:
    """Let decisions from outside, one a block, take the place of the routers'.

    Args:
        blocks: as `find_blocks` gives them.
        decisions: of each block a `Routing`, or what makes one of the tokens [T, D] that enter the block.

    Raises:
        InputError: on a call of a block whose tokens are not as many as its decision's.
    """
    with ExitStack() as stack:
        for block, decide in zip(blocks, decisions, strict=True):
            stack.enter_context(block.routed_by(decide))
        yield
