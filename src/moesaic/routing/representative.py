"""CMoE's analytical router (arXiv 2502.04416, §3.3): one neuron's activation stands for its expert's.

Shapes: T tokens, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..calibration.sample import LayerSample
from ..partition import Partition
from .base import RouterBuilder


@dataclass(frozen=True, kw_only=True)
class Representative(RouterBuilder):
    """`|SiLU(x ĝ) (x û)|` with the representative neuron's unit-norm gate and up rows.

    A partition without representatives gets the most salient neuron of each expert.
    """

    gate: ClassVar[str] = "representative"

    def build(self, sample: LayerSample, partition: Partition) -> dict[str, Tensor]:
        neurons = partition.representatives
        if neurons is None:
            _, _, saliency_F = sample.moments()
            best = saliency_F[partition.experts].argmax(1, keepdim=True)
            neurons = partition.experts.gather(1, best).squeeze(1)
        ffn = sample.ffn
        return {
            "gate_proj": normalize(ffn.gate_FD[neurons].float()),
            "up_proj": normalize(ffn.up_FD[neurons].float()),
            "scale": torch.zeros(len(neurons)),
        }
