"""Balanced assignment of neurons to experts, solved exactly as a transport problem.

Shapes: R neurons to assign, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor


def balanced_assignment(cost_RE: Tensor, size_E: Sequence[int] | None = None) -> Tensor:
    """Assign each neuron to an expert, R / E neurons each, or `size_E`, at the least total cost: int64 [R].

    Equals `scipy.optimize.linear_sum_assignment` on the square cost that repeats each expert's column R / E times,
    as CMoE solves it; the transport problem has E columns in place of R and an integral optimal vertex.
    """
    neurons, experts = cost_RE.shape
    supply = np.ones(neurons)
    capacity = np.full(experts, neurons / experts) if size_E is None else np.array(size_E, float)
    flow_RE: Any = ot.emd(supply, capacity, cost_RE.double().cpu().numpy(), numItermax=10_000_000)
    return torch.from_numpy(flow_RE.argmax(1))


def groups(expert_R: Tensor, neuron_R: Tensor, experts: int) -> Tensor:
    """List the neurons of each expert in ascending order, int64 [E, R / E]."""
    return torch.stack([neuron_R[expert_R == e].sort().values for e in range(experts)])
