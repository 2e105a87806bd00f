"""The stages by hand, on one layer: calibrate, partition, route, and how many tokens each expert gets."""

import torch

import moesaic
from moesaic.calibration.layers import calibrate, relative_error
from moesaic.conversion.layer import build_moe, expert_loads
from moesaic.conversion.prepare import prepare
from moesaic.partition.coactivation import Coactivation

conversion = prepare("tiny", moesaic.ConvertConfig(plan="S2A2E8", tokens=4_096, partition=Coactivation(iterations=4)))
layerwise, tokens = conversion.layerwise, conversion.tokens
layerwise.load_embeddings_and_head()
with torch.no_grad(), layerwise.layer(0) as layer:
    sample = calibrate(layerwise, 0, layer, layerwise.embed(tokens.calibration_NL), tokens.domain_N)
    partition = conversion.partitioner.split(sample, conversion.plan, torch.Generator().manual_seed(0))
    moe = build_moe(conversion, sample, partition)
    print("all experts on:", relative_error(sample, moe.forward_all_experts(sample.input_TD)))
    print("routed:        ", relative_error(sample, moe(sample.input_TD)))
    conversion.recovery.recover(moe, sample, partition)
    print("recovered:     ", relative_error(sample, moe(sample.input_TD)))
    print("tokens of each expert:", expert_loads(moe, sample).tolist())
