"""How many of the neurons that specialists keep are different ones of the dense FFN; see dev/LOG.md, the cut.

python benchmarks/overlap.py gemma-270m --calibration c4.jsonl
"""

from __future__ import annotations

import argparse

import torch

from moesaic import ConvertConfig
from moesaic.calibration.layers import calibrate
from moesaic.conversion.prepare import prepare

EVERY, FIRST = 6, 3
BUDGETS = ((0.25, 1.0), (0.5, 1.0), (0.5, 2.0), (0.25, 4.0))
"""(share of each FFN active, memory factor)."""


@torch.no_grad()
def distinct(model: str, config: ConvertConfig) -> tuple[str, list[float]]:
    """(plan, different neurons over kept ones in every `EVERY`-th layer) of the dense model's own activations."""
    conversion = prepare(model, config)
    conversion.layerwise.load_embeddings_and_head()
    hidden_NLD = conversion.layerwise.embed(conversion.tokens.calibration_NL)
    generator, shares = torch.Generator().manual_seed(config.seed), []
    for index in range(len(conversion.layerwise.layers)):
        with conversion.layerwise.layer(index) as layer:
            if index % EVERY == FIRST:
                sample = calibrate(conversion.layerwise, index, layer, hidden_NLD, conversion.tokens.domain_N)
                found = conversion.partitioner.split(sample, conversion.plan, generator)
                shared = len(found.shared)
                shares.append((len(found.experts.unique()) + shared) / (found.experts.numel() + shared))
            hidden_NLD = conversion.layerwise.run(index, layer, hidden_NLD)
    return str(conversion.plan), shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=8_192)
    a = parser.parse_args()
    for active, factor in BUDGETS:
        config = ConvertConfig(
            active=active, memory_factor=factor, partition="specialists", calibration=tuple(a.calibration),
            tokens=a.tokens,
        )  # fmt: skip
        plan, shares = distinct(a.model, config)
        print(f"{active:.0%} active, memory x {factor:g}, {plan}:", ", ".join(f"{share:.2f}" for share in shares))
