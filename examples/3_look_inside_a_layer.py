"""The stages by hand, on one layer: calibrate, partition, route, and how many tokens each expert gets."""

import torch

import moesaic
from moesaic.calibration.layers import calibrate, expert_load, relative_error
from moesaic.job import prepare
from moesaic.layer import build_moe
from moesaic.partition.coactivation import Coactivation

job = prepare("tiny", moesaic.ConvertConfig(plan="S2A2E8", tokens=4_096, partition=Coactivation(iterations=4)))
job.stream.load_outer()
with torch.no_grad(), job.stream.layer(0) as layer:
    sample = calibrate(job.stream, 0, layer, job.stream.embed(job.tokens_NL), job.domain_N)
    partition = job.partitioner.split(sample, job.plan, torch.Generator().manual_seed(0))
    moe = build_moe(job, sample, partition)
    print("all experts on:", relative_error(sample, moe.all_on(sample.input_TD)))
    print("routed:        ", relative_error(sample, moe(sample.input_TD)))
    job.recovery.recover(moe, sample, partition)
    print("recovered:     ", relative_error(sample, moe(sample.input_TD)))
    print("tokens of each expert:", expert_load(moe, sample).tolist())
