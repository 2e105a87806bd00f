from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from conftest import random_sample, whole
from moesaic import Plan, registry
from moesaic.calibration.ridge import WeightedRidge
from moesaic.partition import coactivation
from moesaic.partition._alternation import alternate, fitted_scores, importance, memberships
from moesaic.partition._assignment import balanced_assignment
from moesaic.partition.cmoe import active_neurons, l1_distance
from moesaic.partition.specialists import cluster_saliency, spherical_kmeans

PARTITIONERS = [name for name in registry.names("partition") if not whole(name)]
DISJOINT = [name for name in PARTITIONERS if not registry.method_class("partition", name).overlapping]
ROUTED = [name for name in DISJOINT if not registry.method_class("partition", name).static]


@pytest.mark.parametrize("name", ROUTED)
@settings(max_examples=12, deadline=None)
@given(width=st.integers(1, 6), shared=st.integers(0, 3), active=st.integers(1, 3), idle=st.integers(0, 3))
def test_a_disjoint_partition_is_a_permutation(name, width, shared, active, idle):
    plan = Plan(shared, active, shared + active + idle, width)
    sample = random_sample(tokens=40, hidden=8, neurons=plan.groups * width)
    partition = registry.build("partition", name).split(sample, plan, torch.Generator().manual_seed(1))
    assert partition.is_disjoint(sample.ffn.intermediate_size)
    assert partition.experts.shape == (plan.num_experts, width)
    assert len(partition.shared) == plan.shared_width


@pytest.mark.parametrize("name", PARTITIONERS)
def test_partitions_are_reproducible_and_of_the_planned_size(name):
    plan = Plan(1, 0, 4, 12) if registry.method_class("partition", name).static else Plan(1, 1, 4, 12)
    first, again = (
        registry.build("partition", name).split(random_sample(), plan, torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first.all_neurons(), again.all_neurons())
    assert first.experts.shape == ((3, 12) if plan.num_experts else (0, 0))


@pytest.mark.parametrize("name", ROUTED)
def test_without_active_experts_the_rest_is_dropped(name):
    partition = registry.build("partition", name).split(random_sample(), Plan(2, 0, 4, 12), torch.Generator())
    assert len(partition.shared) == 24
    assert partition.experts.numel() == 0


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(2, 5), each=st.integers(1, 8), seed=st.integers(0, 99))
def test_balanced_assignment_equals_the_square_assignment(experts, each, seed):
    cost = torch.rand(experts * each, experts, generator=torch.Generator().manual_seed(seed))
    chosen = balanced_assignment(cost)
    assert torch.bincount(chosen, minlength=experts).tolist() == [each] * experts
    square = np.repeat(cost.numpy(), each, axis=1)
    rows, columns = linear_sum_assignment(square)
    assert cost.gather(1, chosen[:, None]).sum().item() == pytest.approx(square[rows, columns].sum(), rel=1e-5)


def test_groups_of_given_sizes_are_assigned_at_the_least_cost():
    cost, sizes = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)), [2, 3, 7]
    chosen = balanced_assignment(cost, sizes)
    assert torch.bincount(chosen).tolist() == sizes
    square = np.repeat(cost.numpy(), sizes, axis=1)
    rows, columns = linear_sum_assignment(square)
    assert cost.gather(1, chosen[:, None]).sum().item() == pytest.approx(square[rows, columns].sum(), rel=1e-5)


def test_l1_distance_equals_cdist():
    a = (torch.rand(20, 30) < 0.2).float()
    c = torch.rand(4, 30)
    torch.testing.assert_close(l1_distance(a, c), torch.cdist(a, c, p=1))
    torch.testing.assert_close(l1_distance(a.bool(), c), torch.cdist(a, c, p=1))


def test_atopk_marks_the_largest_activations_of_each_token():
    sample = random_sample(tokens=30)
    active = active_neurons(sample, 5)
    assert active.sum(0).tolist() == [5] * 30
    unit = torch.nn.functional.normalize
    x, ffn = unit(sample.input_TD), sample.ffn
    h = (torch.nn.functional.silu(x @ unit(ffn.gate_FD).T) * (x @ unit(ffn.up_FD).T)).abs()
    assert h[active.T].view(30, 5).min(1).values.ge(h.masked_fill(active.T, -1).max(1).values).all()


def test_cmoe_as_its_code_has_it_represents_by_the_mean_of_the_last_members():
    sample, plan = random_sample(tokens=64), Plan(1, 1, 4, 12)
    build = lambda options: registry.build("partition", f"cmoe:{options}").split(sample, plan, torch.Generator())  # noqa: E731
    paper, code = build("iterations=1"), build("iterations=1,final_centroids=True")
    assert torch.equal(paper.experts, code.experts)
    assert torch.equal(paper.shared, code.shared)
    column = active_neurons(sample, 10).float()
    for members, representative in zip(code.experts, code.representatives, strict=True):
        distance = (column[members] - column[members].mean(0)).abs().sum(1)
        assert representative in members
        assert distance[members == representative].item() == pytest.approx(distance.min().item(), abs=1e-4)
    assert not torch.equal(paper.representatives, code.representatives)


def test_static_keeps_the_largest_fluctuation_and_compensates_the_mean():
    sample = random_sample()
    plan = Plan(2, 0, 4, 12)
    partition = registry.build("partition", "static").split(sample, plan, torch.Generator())
    h = sample.ffn.hidden(sample.input_TD)
    metric = h.var(0, correction=0) * sample.ffn.down_DF.square().sum(0)
    assert set(partition.shared.tolist()) == set(metric.topk(24).indices.tolist())
    dropped = sorted(set(range(48)) - set(partition.shared.tolist()))
    torch.testing.assert_close(partition.bias_D, sample.ffn.down_DF[:, dropped] @ h[:, dropped].mean(0))
    weighted = registry.build("partition", "static:weighted=True").split(sample, plan, torch.Generator())
    saliency = (h * sample.weight_T[:, None]).square().mean(0) * sample.ffn.down_DF.square().sum(0)
    assert set(weighted.shared.tolist()) == set(saliency.topk(24).indices.tolist())
    assert set(weighted.shared.tolist()) != set(partition.shared.tolist())


def test_specialists_take_the_neurons_that_matter_in_their_cluster():
    sample = random_sample()
    clusters = registry.build("partition", "specialists:alternations=0")
    partition = clusters.split(sample, Plan(0, 1, 3, 16), torch.Generator())
    cluster = (torch.nn.functional.normalize(sample.input_TD) @ partition.centroids_ED.T).argmax(1)
    saliency = cluster_saliency(sample, cluster, 3)
    for e in range(3):
        own = sample.input_TD[cluster == e], sample.weight_T[cluster == e]
        naive = (sample.ffn.hidden(own[0]) * own[1][:, None]).square().sum(0) * sample.ffn.down_DF.square().sum(0)
        torch.testing.assert_close(saliency[e], naive)
        assert set(partition.experts[e].tolist()) == set(naive.topk(16).indices.tolist())


def test_kmeans_separates_what_is_separate_and_survives_empty_clusters():
    g = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(
        torch.eye(3).repeat_interleave(20, 0) + 0.05 * torch.randn(60, 3, generator=g)
    )
    centroids = spherical_kmeans(points, 3, 20, torch.Generator().manual_seed(5))
    assert (points @ centroids.T).argmax(1).view(3, 20).unique(dim=1).shape == (3, 1)
    assert torch.isfinite(spherical_kmeans(points[:1].repeat(8, 1), 4, 3, torch.Generator())).all()


def test_domain_experts_have_the_neurons_of_their_domain():
    sample = random_sample(tokens=400)
    partition = registry.build("partition", "domains:saliency=True").split(sample, Plan(0, 1, 4, 12), torch.Generator())
    h = sample.ffn.hidden(sample.input_TD) * sample.weight_T[:, None] * sample.ffn.down_DF.norm(dim=0)
    for domain in range(4):
        own = h[sample.domain_T == domain].square().sum(0).topk(12).indices.sort().values
        assert partition.experts[domain].tolist() == own.tolist()
    assert partition.centroids_ED.norm(dim=1).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("tokens", [300, 5_000])
def test_points_multiply_as_the_regressions_predictions_do(tokens):
    sample = random_sample(tokens=tokens)
    saliency_F, points_FD = coactivation.predicted_importance(sample, ridge=1e-6)
    norm_F = sample.ffn.down_DF.norm(dim=0)
    value_TF = (sample.ffn.hidden(sample.input_TD) * sample.weight_T[:, None] * norm_F).square().double()
    torch.testing.assert_close(saliency_F.double(), value_TF.mean(0), rtol=1e-4, atol=1e-7)
    x_TD, centred_TF = (m.double() - m.double().mean(0) for m in (sample.input_TD, value_TF))
    predicted_TF = x_TD @ torch.linalg.lstsq(x_TD, centred_TF).solution
    torch.testing.assert_close((points_FD @ points_FD.T).double(), predicted_TF.T @ predicted_TF, rtol=1e-2, atol=1e-3)


def test_squares_of_float16_do_not_overflow():
    sample = random_sample(dtype=torch.float16)
    loud = replace(sample, input_TD=sample.input_TD * 60)
    assert loud.ffn.hidden(loud.input_TD).isfinite().all()
    assert loud.ffn.hidden(loud.input_TD).abs().max() > 256
    assert importance(loud).isfinite().all()
    saliency_F, points_FD = coactivation.predicted_importance(loud, 0.1)
    assert saliency_F.isfinite().all()
    assert points_FD.isfinite().all()


def test_coactivation_groups_neurons_by_what_the_input_says_of_them():
    sample = random_sample(neurons=24, tokens=2_000)
    kind = torch.arange(24) % 4  # neurons of one kind read one channel and answer with signs of their own
    rows_FD = torch.eye(16)[kind] + 0.01 * torch.randn(24, 16)
    sample.ffn.gate_FD.copy_(4 * rows_FD)
    sample.ffn.up_FD.copy_(rows_FD * torch.randn(24, 1).sign())
    partition = registry.build("partition", "coactivation").split(sample, Plan(0, 1, 4, 6), torch.Generator())
    assert {tuple(kind[e].unique().tolist()) for e in partition.experts} == {(0,), (1,), (2,), (3,)}


def test_neurons_move_by_what_they_would_catch_of_the_tokens_that_the_router_sends():
    sample = random_sample(tokens=3_000)
    experts = torch.arange(36).view(3, 12)
    seen = []
    member = memberships(experts, 48)
    assert torch.equal(alternate(sample, member, 2, 5, lambda caught: seen.append(caught) or member), member)
    [caught] = seen  # once nothing moves the rounds are over
    value = (sample.ffn.hidden(sample.input_TD) * sample.ffn.down_DF.norm(dim=0)).square()
    torch.testing.assert_close(importance(sample), value)
    norms = torch.stack([value[:, e].sum(1).sqrt() for e in experts], dim=1)
    x, weight = torch.cat([sample.input_TD, torch.ones(3_000, 1)], 1), sample.weight_T[:, None]
    slopes = torch.linalg.lstsq(x * weight, (norms - norms.mean(1, keepdim=True)) * weight).solution
    sent = torch.zeros(3_000, 3).scatter(1, (x @ slopes).topk(2).indices, 1.0)
    naive = torch.stack([(value * weight.square() * sent[:, [e]]).mean(0) for e in range(3)], dim=1)
    torch.testing.assert_close(caught[:, :3], naive, rtol=0.05, atol=0.05 * naive.mean().item())
    torch.testing.assert_close(caught[:, 3], (value * weight.square()).mean(0))


@pytest.mark.parametrize("name", ["coactivation", "specialists"])
@pytest.mark.parametrize("shared", [0, 1])
def test_alternation_catches_more_of_the_importance(name, shared):
    sample = random_sample(tokens=2_000)
    plan = Plan(shared, 1, 4, 12)

    def caught(alternations):
        partitioner = registry.build("partition", f"{name}:alternations={alternations}")
        partition = partitioner.split(sample, plan, torch.Generator().manual_seed(0))
        member = memberships(partition.experts, 48)
        value = importance(sample)
        ridge = WeightedRidge(sample.input_TD, sample.weight_T, ridge=1e-2)
        sent = fitted_scores(ridge, (value @ member).sqrt()).topk(1).indices
        routed = (value @ member).gather(1, sent).squeeze(1) + value[:, partition.shared].sum(1)
        return (routed * sample.weight_T.square()).sum().item()

    assert caught(20) > caught(0)


def test_moefication_puts_similar_gate_rows_together():
    sample = random_sample(neurons=24)
    direction = torch.eye(16)[:4].repeat_interleave(6, 0)
    sample.ffn.gate_FD.copy_(direction + 0.01 * torch.randn(24, 16))
    partition = registry.build("partition", "moefication").split(sample, Plan(0, 1, 4, 6), torch.Generator())
    assert {tuple(e) for e in partition.experts.tolist()} == {tuple(range(i, i + 6)) for i in range(0, 24, 6)}
