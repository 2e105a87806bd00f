"""The contract of a partitioning method.

Shapes: F neurons of the dense FFN, E routed experts, I neurons of one, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.activations import LayerActivations
from ..given import Limit
from ..plan import Plan


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which neurons are always on and which belong to each routed expert, as indices into the dense FFN.

    Disjoint partitions are a permutation of all neurons; specialists may overlap and leave neurons out.
    """

    shared: Tensor
    """Neurons of the shared expert, int64; may be empty."""
    experts: Tensor
    """Neurons of each routed expert, int64 [E, I]; may be [0, 0]."""
    bias_D: Tensor | None = None
    """What the dropped neurons add on average (FLAP), added to the shared expert's output."""
    representatives: Tensor | None = None
    """The neuron that stands for each expert, int64 [E] (CMoE)."""
    centroids_ED: Tensor | None = None
    """Directions of the FFN's input that belong to each expert (specialists)."""

    def is_disjoint(self, intermediate_size: int) -> bool:
        """Tell whether shared and routed neurons together are a permutation of all neurons."""
        return torch.equal(self.all_neurons().sort().values, torch.arange(intermediate_size))

    def is_whole(self, intermediate_size: int) -> bool:
        """Tell whether every expert has all neurons, and none is shared."""
        every_F = torch.arange(intermediate_size)
        return not len(self.shared) and all(torch.equal(e.cpu().sort().values, every_F) for e in self.experts)

    def all_neurons(self) -> Tensor:
        """List the shared neurons, then each routed expert's, on the CPU."""
        return torch.cat([self.shared.cpu(), self.experts.flatten().cpu()])

    def to(self, device: torch.device) -> Partition:
        """Move all tensors to one device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Partitioner(ABC):
    """A method that splits a layer's neurons by a plan; hyper-parameters are its fields."""

    default_router: ClassVar[str] = "linear"
    """The routing method that belongs to this partition."""
    default_recovery: ClassVar[str] = "closed-form"
    """What wins back quality after it, unless another one is asked for."""
    limits: ClassVar[Mapping[str, Limit]] = {}
    """What its options may be, where settings of the same name mean something else."""
    overlapping: ClassVar[bool] = False
    """Whether experts may share neurons, so that the plan's groups need not add up to the FFN."""
    whole_experts: ClassVar[bool] = False
    """Whether every expert is the whole FFN, so that its options alone say how many there are and how many run."""
    labelled: ClassVar[bool] = False
    """Whether it needs text of several domains, one an expert at least."""
    static: ClassVar[bool] = False
    """Whether nothing is routed: shared groups stay, the others are dropped."""

    @property
    def token_clusters(self) -> bool:
        """Whether its experts are those of clusters of tokens, whose centroids the partition has."""
        return False

    def shape(self, active: float, memory_factor: float, intermediate_size: int) -> Plan | None:
        """Choose the shape of an ffn share where the method has one of its own; None: as others of its kind.

        Raises:
            InputError: there is none within that memory.
        """
        return None

    @abstractmethod
    def split(self, sample: LayerActivations, plan: Plan, generator: torch.Generator) -> Partition:
        """Choose the neurons of the shared expert (`plan.shared_width`) and of `plan.num_experts` routed experts.

        Args:
            sample: one layer's FFN and its calibration tokens.
            plan: how many groups there are, and how many neurons each has.
            generator: the source of everything random.
        """


class WholeModel(ABC):
    """A partitioner whose tokens get experts for all layers at once, before any layer is split."""

    def repeats(self) -> int:
        """Say how often tokens go where a router ahead of the model sends them, and neurons follow."""
        return 0

    @abstractmethod
    def profile(self, sample: LayerActivations, layers: int, generator: torch.Generator) -> Tensor:
        """Say of each token what one of so many layers knows of it, float32 [T, P]."""

    @abstractmethod
    def send(self, profile_TX: Tensor, domain_T: Tensor, plan: Plan, generator: torch.Generator) -> Tensor:
        """Choose each token's experts in all layers, int64 [T, K], by all layers' profiles side by side."""


def disjoint(order_F: Tensor, plan: Plan) -> Partition:
    """Cut an ordering of all neurons [F] into a partition: the first groups shared, the rest an expert each."""
    shared, routed = order_F.split([plan.shared_width, len(order_F) - plan.shared_width])
    experts = routed.view(plan.num_experts, plan.width) if plan.num_experts else routed[:0].view(0, 0)
    return Partition(shared=shared, experts=experts)
