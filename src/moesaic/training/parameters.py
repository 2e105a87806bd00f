"""Which parameters of a converted model learn, and those that FSDP has cut into shards, one a process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import WorkError

PARTS = (("router", ".pregate."), ("embeddings", "embed_tokens"), ("embeddings", "lm_head"),
         ("shared", ".shared_experts."), ("routed", ".experts."), ("router", ".gate."), ("norms", "norm"),
         ("dense", ".gate_proj."), ("dense", "up_proj."), ("dense", ".down_proj."))  # fmt: skip
REST = "attention"


def part(name: str) -> str:
    """Name the part that a parameter belongs to: `attention`, `shared`, `routed`, `dense` (FFNs that stay so), ..."""
    return next((part for part, key in PARTS if key in f".{name}"), REST)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def counts(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Count the parameters of each part."""
    found: dict[str, int] = {}
    for name, parameter in named:
        found[part(name)] = found.get(part(name), 0) + parameter.numel()
    return found


def check_gradients(named: dict[str, nn.Parameter]) -> None:
    """Check that every part that should learn got a gradient in the first step.

    Raises:
        WorkError: one got none.
    """
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


def shard(module: nn.Module, layers: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Cut a model's parameters over the processes: each layer is whole only while it runs (FSDP2)."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for part in (*layers, module):
        fully_shard(part, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Gather the whole of a tensor; every process must ask for it at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Cut a whole tensor as `parameter` is cut."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


@torch.no_grad()
def gather(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors whole to the CPU."""
    return {name: whole(tensor.detach()).cpu().clone() for name, tensor in named.items()}


@torch.no_grad()
def put_back(named: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into parameters of the same names."""
    for name, parameter in named.items():
        parameter.copy_(like(parameter, tensors[name]))
