"""Experts merged into the most similar of those that run most often (M-SMoE: Li et al., arXiv 2310.01334, §3).

Shapes: T tokens, E routed experts, N experts that are kept, I neurons of one, D hidden size, X features of a neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...partition._assignment import balanced_assignment
from ..sample import BlockSample
from .base import Kept, Pruner, best


@dataclass(frozen=True, kw_only=True)
class Merge(Pruner):
    """`W_d = sum_e f_e P_e W_e / sum_e f_e` over the experts e of dominant expert d, f how often each runs.

    The dominant experts are those that run most often, and keep their router rows. Any other expert belongs to the one
    (of its routing group) whose router logits have the largest cosine with its own; P_e puts its neurons into the
    order of d's, by the assignment of largest cosine.
    """

    reads_neurons: ClassVar[bool] = True

    align: bool = True
    """Whether neurons are put into the dominant expert's order before they are averaged."""

    def select(self, sample: BlockSample, keep: int, generator: torch.Generator) -> Kept:
        count_E = sample.expert_tokens()
        kept_N = best(count_E, keep, sample.groups)
        owner_E = owners(sample.logits(), kept_N, sample.groups)
        gate_up_EXD, down_EDI = (sample.block.experts.get_parameter(n) for n in ("gate_up_proj", "down_proj"))
        gate_up, down = gate_up_EXD[kept_N].float(), down_EDI[kept_N].float()
        for number, dominant in enumerate(kept_N.tolist()):
            members = [e for e in (owner_E == dominant).nonzero().flatten().tolist() if e != dominant]
            if not members:
                continue
            own = neurons(gate_up_EXD[dominant], down_EDI[dominant])
            total_IX, weight = own * max(float(count_E[dominant]), 1), max(float(count_E[dominant]), 1)
            for member in members:
                other = neurons(gate_up_EXD[member], down_EDI[member])
                order_I = alignment(own, other) if self.align else slice(None)
                total_IX = total_IX + other[order_I] * float(count_E[member])
                weight += float(count_E[member])
            gate_up[number], down[number] = matrices(total_IX / weight)
        return Kept(experts=kept_N, changed={"gate_up_proj": gate_up, "down_proj": down})


def owners(logits_TE: Tensor, kept_N: Tensor, groups: int = 1) -> Tensor:
    """Find the kept expert of the same group whose logits are most like each expert's, int64 [E]; a kept one's is it.

    Likeness is the cosine over tokens of logits without each token's mean.
    """
    count = logits_TE.shape[1]
    logits_TE = normalize(logits_TE.float() - logits_TE.float().mean(1, keepdim=True), dim=0)
    likeness_EN = (logits_TE.T @ logits_TE[:, kept_N.to(logits_TE.device)]).cpu()
    group_E = torch.arange(count) // (count // groups)
    likeness_EN[group_E[:, None] != group_E[kept_N]] = -torch.inf
    owner_E = kept_N[likeness_EN.argmax(1)]
    owner_E[kept_N] = kept_N
    return owner_E


def neurons(gate_up_XD: Tensor, down_DI: Tensor) -> Tensor:
    """Write an expert as one row a neuron: its gate row, up row and down column, float32 [I, 3 D]."""
    return torch.cat([*gate_up_XD.float().chunk(2), down_DI.float().T], dim=1)


def matrices(neurons_IX: Tensor) -> tuple[Tensor, Tensor]:
    """Write neurons as `gate_up` [2 I, D] and `down` [D, I]: the inverse of `neurons`."""
    gate_ID, up_ID, down_ID = neurons_IX.chunk(3, dim=1)
    return torch.cat([gate_ID, up_ID]), down_ID.T


def alignment(own_IX: Tensor, other_IX: Tensor) -> Tensor:
    """Find the order of another expert's neurons in which they are most like one's own, int64 [I].

    Equals `scipy.optimize.linear_sum_assignment` of the negative cosines.
    """
    return balanced_assignment(-(normalize(own_IX) @ normalize(other_IX).T))
