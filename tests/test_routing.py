from types import SimpleNamespace

import torch
from torch.nn.functional import linear

from conftest import random_sample
from moesaic import Plan, registry
from moesaic.routing.base import unit_scores
from moesaic.routing.mlp import MLPGate
from moesaic.routing.representative import balance


def test_balancing_evens_out_the_load():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(4_000, 6, generator=g) + torch.tensor([0.5, 0.2, 0, 0, 0, 0])

    def spread(bias):
        load = torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=6).float()
        return (load.std() / load.mean()).item()

    assert spread(torch.zeros(6)) > 0.5
    assert spread(balance(scores, 2, rounds=600, step=1e-3)) < 0.05


def test_cmoes_router_uses_the_representatives_unit_rows_and_can_balance():
    sample, plan = random_sample(), Plan(0, 1, 4, 12)
    partition = registry.build("partition", "cmoe").split(sample, plan, torch.Generator())
    for e, neuron in enumerate(partition.representatives):
        assert neuron in partition.experts[e]
    parameters = registry.build("router", "representative:balance_rounds=50").fit(sample, partition, 1)
    rows = sample.ffn.gate_FD[partition.representatives]
    torch.testing.assert_close(parameters["gate_proj"], rows / rows.norm(dim=1, keepdim=True))
    assert parameters["scale"].abs().max() == 0
    assert parameters["e_score_correction_bias"].abs().max() > 0
    assert "e_score_correction_bias" not in registry.build("router", "representative").fit(sample, partition, 1)


def test_moefications_router_learns_which_expert_speaks():
    sample, plan = random_sample(tokens=2_000), Plan(0, 1, 4, 12)
    partition = registry.build("partition", "coactivation").split(sample, plan, torch.Generator().manual_seed(0))
    gate = MLPGate(SimpleNamespace(hidden_size=16, num_experts=4, num_experts_per_tok=1, selection="top-k"))
    for name, value in registry.build("router", "mlp").fit(sample, partition, 1).items():
        gate.get_parameter(name).data.copy_(value)
    loud = sample.ffn.hidden(sample.input_TD).abs()[:, partition.experts].sum(2).argmax(1)
    assert (gate(sample.input_TD, None)[0].squeeze(1) == loud).float().mean() > 0.4


def test_gate_centroids_are_mean_rows():
    sample = random_sample()
    partition = registry.build("partition", "expertweaver").split(sample, Plan(1, 1, 4, 12), torch.Generator())
    weight = registry.build("router", "gate-centroid").fit(sample, partition, 1)["weight"]
    torch.testing.assert_close(weight[1], sample.ffn.gate_FD[partition.experts[1]].mean(0))


def test_unit_scores_keep_the_choices():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=g)
    gate = {"weight": 5 + 40 * torch.randn(6, 8, generator=g), "e_score_correction_bias": torch.randn(6, generator=g)}
    unit = unit_scores(gate, x)
    before, after = (linear(x, u["weight"], u["e_score_correction_bias"]) for u in (gate, unit))
    assert torch.equal(before.topk(2).indices, after.topk(2).indices)
    assert 0.7 < after.square().mean().sqrt() < 1.5
    torch.testing.assert_close(after.mean(1), torch.zeros(300), atol=1e-5, rtol=0)
    ratio = (before - before.mean(1, keepdim=True)) / after
    assert ratio.median().log2().frac().abs() < 1e-4
