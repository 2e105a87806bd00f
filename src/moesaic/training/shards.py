"""Parameters that FSDP has cut into shards, one a process, as whole tensors and back; others pass as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, layers: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Cut a model's parameters over the processes: each layer is whole only while it runs (FSDP2)."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for part in (*layers, module):
        fully_shard(part, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every process must ask for it at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, cut as `parameter` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


@torch.no_grad()
def gather(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies, on the CPU."""
    return {name: whole(tensor.detach()).cpu().clone() for name, tensor in named.items()}


@torch.no_grad()
def put_back(named: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into parameters of the same names."""
    for name, parameter in named.items():
        parameter.copy_(like(parameter, tensors[name]))
