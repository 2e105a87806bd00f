"""Which parts of a converted model learn."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import WorkError
from .shards import whole

PARTS = (("embeddings", "embed_tokens"), ("embeddings", "lm_head"), ("shared", ".shared_experts."),
         ("routed", ".experts."), ("router", ".gate."), ("norms", "norm"))  # fmt: skip
REST = "attention"


def part(name: str) -> str:
    """`attention`, `shared`, `routed`, `router`, `norms` or `embeddings`: where a parameter of that name belongs."""
    return next((part for part, key in PARTS if key in f".{name}"), REST)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def counts(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """How many parameters each part has."""
    found: dict[str, int] = {}
    for name, parameter in named:
        found[part(name)] = found.get(part(name), 0) + parameter.numel()
    return found


def check_gradients(named: dict[str, nn.Parameter]) -> None:
    """Raises WorkError if a part that should learn got no gradient in the first step."""
    alive = {part(name) for name, p in named.items() if p.grad is not None and bool(whole(p.grad).any())}
    frozen = sorted({part(name) for name in named} - alive)
    if frozen:
        raise WorkError(
            f"no gradient reached {', '.join(frozen)}, so training would silently leave it as it is; choose another "
            "--method or objective"
        )


def learn(parameters: Iterable[nn.Parameter]) -> None:
    """Let parameters learn, in float32: the steps of training are smaller than bfloat16's."""
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def same_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring all parameters to the dtype that the model had."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
