"""Closed-form recovery and the ridge router are the least squares that they say."""

import numpy as np
import pytest
import torch

from conftest import block_for, random_sample
from moesaic import Plan, registry
from moesaic.calibration import activations as sample_module
from moesaic.calibration.layers import relative_error
from moesaic.calibration.ridge import WeightedRidge
from moesaic.recovery import closed_form
from moesaic.recovery.closed_form import HELD_OUT, RIDGES, ClosedForm, add, joint_features, ridge_change, solve_arrows

PLANS = [
    ("random", Plan(1, 2, 4, 12)),
    ("coactivation", Plan(0, 2, 4, 12)),
    ("static", Plan(2, 0, 4, 12)),
    ("specialists", Plan(0, 1, 3, 16)),
    ("specialists", Plan(1, 1, 4, 12)),
]


def converted(name, plan, tokens=400):
    sample = random_sample(tokens=tokens)
    partitioner = registry.build("partition", name)
    partition = partitioner.split(sample, plan, torch.Generator().manual_seed(0))
    moe = block_for(sample, plan, bias=partitioner.static)
    router = registry.build("router", partitioner.default_router)
    gate = router.fit(sample, partition, plan.num_experts_per_tok) if plan.num_experts else {}
    moe.load_dense(sample.ffn, partition.shared, partition.experts, gate, partition.bias_D)
    return moe, sample, partition


def masked_features(moe, sample, blocks):
    """The naive twin: all blocks' activations side by side, zero where an expert does not run, token-weighted."""
    columns, shared = [], moe.shared_experts is not None
    h = sample.ffn.hidden(sample.input_TD)
    index = moe.gate(sample.input_TD, moe.experts)[0] if moe.gate is not None else None
    for number, block in enumerate(blocks):
        on = torch.ones(len(h), 1) if shared and number == 0 else (index == number - shared).any(1, keepdim=True)
        columns.append(h[:, block] * on)
    return torch.cat(columns, 1) * sample.weight_T[:, None]


def blocks_of(partition):
    return [partition.shared] * bool(len(partition.shared)) + list(partition.experts)


@pytest.mark.parametrize(("name", "plan"), PLANS)
@pytest.mark.parametrize("chunk", [7, 64, 10_000])
def test_normal_equations_equal_the_masked_product_for_any_chunk(name, plan, chunk, monkeypatch):
    monkeypatch.setattr(sample_module, "CHUNK_TOKENS", chunk)
    moe, sample, partition = converted(name, plan)
    systems = {}
    for features in joint_features(moe, sample, blocks_of(partition)):
        add(systems, *features)
    gram, right = systems[0]
    z = masked_features(moe, sample, blocks_of(partition))
    rest = (sample.output_TD - moe(sample.input_TD)) * sample.weight_T[:, None]
    torch.testing.assert_close(gram.tril(), (z.T @ z).tril(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, z.T @ rest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_recovery_equals_weighted_lstsq(name, plan):
    moe, sample, partition = converted(name, plan)
    z = masked_features(moe, sample, blocks_of(partition)).double()
    target = sample.output_TD - (partition.bias_D if partition.bias_D is not None else 0)
    right = (target * sample.weight_T[:, None]).double()
    expected = np.linalg.lstsq(z.numpy(), right.numpy(), rcond=None)[0]
    ClosedForm(ridge=1e-9).recover(moe, sample, partition)
    parts = [moe.shared_experts.down_proj.weight.T] if moe.shared_experts is not None else []
    parts += [d.T for d in moe.experts.down_proj] if moe.experts is not None else []
    torch.testing.assert_close(torch.cat(parts), torch.from_numpy(expected).float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_recovery_never_raises_the_calibration_objective(name, plan):
    moe, sample, partition = converted(name, plan)
    before = relative_error(sample, moe(sample.input_TD))
    ClosedForm().recover(moe, sample, partition)
    assert relative_error(sample, moe(sample.input_TD)) <= before + 1e-6


@pytest.mark.parametrize("plan", [Plan(1, 1, 4, 12), Plan(0, 1, 4, 12), Plan(1, 2, 4, 12)])
def test_weights_that_a_gate_gives_are_part_of_the_system(plan):
    """DSMoE's gate weighs by its sigmoids, a single expert too."""
    sample = random_sample(tokens=400)
    partition = registry.build("partition", "coactivation").split(sample, plan, torch.Generator().manual_seed(0))
    moe = block_for(sample, plan, gate="sigmoid", selection="top-k")
    gate = registry.build("router", "sigmoid").fit(sample, partition, plan.num_experts_per_tok)
    moe.load_dense(sample.ffn, partition.shared, partition.experts, gate, None)
    h, routed = sample.ffn.hidden(sample.input_TD), moe.gate(sample.input_TD, moe.experts)
    assert (routed.top_k_weights - 1).abs().max() > 0.1
    weight_TE = torch.zeros(400, plan.num_experts).scatter_(1, *routed)
    shared = [h[:, partition.shared]] * bool(plan.shared)
    z = torch.cat([*shared, *(h[:, b] * weight_TE[:, e, None] for e, b in enumerate(partition.experts))], 1)
    w = sample.weight_T[:, None]
    expected = np.linalg.lstsq((z * w).double().numpy(), (sample.output_TD * w).double().numpy(), rcond=None)[0]
    ClosedForm(ridge=1e-9).recover(moe, sample, partition)
    parts = [moe.shared_experts.down_proj.weight.T] if plan.shared else []
    found = torch.cat([*parts, *(d.T for d in moe.experts.down_proj)])
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_infinite_ridge_leaves_the_weights_alone(name, plan):
    moe, sample, partition = converted(name, plan)
    before = {k: v.clone() for k, v in moe.state_dict().items()}
    ClosedForm(ridge=1e12).recover(moe, sample, partition)
    for key, value in moe.state_dict().items():
        torch.testing.assert_close(value, before[key])


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_the_ridge_is_that_of_least_error_on_held_out_tokens(name, plan):
    moe, sample, partition = converted(name, plan)
    few = sample.take(slice(sample.tokens - sample.tokens // HELD_OUT))
    rest = sample.take(slice(few.tokens, None))
    errors = []
    for ridge in RIDGES:
        ClosedForm(ridge=ridge).recover(moe, few, partition)
        errors.append(relative_error(rest, moe(rest.input_TD)))
    ClosedForm(ridge=RIDGES[int(np.argmin(errors))]).recover(moe, sample, partition)
    expected = {name: weight.clone() for name, weight in moe.state_dict().items()}
    ClosedForm().recover(moe, sample, partition)
    torch.testing.assert_close(dict(moe.state_dict()), expected, rtol=1e-4, atol=1e-5)


def test_a_sketch_of_the_outputs_finds_the_same_ridge(monkeypatch):
    solved = []
    for size in (1_000, 12):  # all 16 outputs, 12 combinations of them
        monkeypatch.setattr(closed_form, "SKETCH", size)
        moe, sample, partition = converted("specialists", Plan(1, 1, 4, 12))
        ClosedForm().recover(moe, sample, partition)
        solved.append(moe.experts.down_proj.clone())
    torch.testing.assert_close(*solved)


def test_full_width_needs_no_recovery():
    moe, sample, partition = converted("random", Plan(1, 3, 4, 12))
    ClosedForm().recover(moe, sample, partition)
    torch.testing.assert_close(moe(sample.input_TD), sample.output_TD, rtol=1e-3, atol=1e-3)


def test_a_specialist_that_no_token_reached_keeps_the_static_solution():
    moe, sample, partition = converted("specialists", Plan(0, 1, 3, 16))
    moe.gate.e_score_correction_bias[2] = -1e9
    ClosedForm(ridge=0.3, other_tokens=0.5).recover(moe, sample, partition)
    z = sample.ffn.hidden(sample.input_TD)[:, partition.experts[2]] * sample.weight_T[:, None]
    right = sample.output_TD * sample.weight_T[:, None]
    dense = sample.ffn.down_DF[:, partition.experts[2]].T
    own = dense + ridge_change(z.T @ z, z.T @ (right - z @ dense), 0.3)
    torch.testing.assert_close(moe.experts.down_proj[2].T, own, rtol=1e-3, atol=1e-3)


def test_singular_systems_fall_back_to_double_and_no_tokens_to_the_prior():
    assert torch.equal(ridge_change(torch.zeros(6, 6), torch.zeros(6, 3), 1e-3), torch.zeros(6, 3))
    z = torch.randn(40, 2) @ torch.randn(2, 6)
    y = z @ torch.randn(6, 3)
    solved = ridge_change(z.T @ z, z.T @ y, 1e-9)
    torch.testing.assert_close(z @ solved, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shared", [0, 5])
def test_block_elimination_equals_the_whole_system(shared):
    g = torch.Generator().manual_seed(0)
    systems = {}
    whole, rest = torch.zeros(shared + 18, shared + 18), torch.zeros(shared + 18, 4)
    for e in range(3):
        z, y = torch.randn(50, shared + 6, generator=g), torch.randn(50, 4, generator=g)
        systems[e] = z.T @ z, z.T @ y
        columns = [*range(shared), *range(shared + 6 * e, shared + 6 * e + 6)]
        wide = torch.zeros(50, shared + 18)
        wide[:, columns] = z
        whole += wide.T @ wide
        rest += wide.T @ y
    torch.testing.assert_close(torch.cat(solve_arrows(systems, shared, 0.3)), ridge_change(whole, rest, 0.3))


def test_the_ridge_does_not_depend_on_a_neurons_scale():
    z, y = torch.randn(60, 6), torch.randn(60, 3)
    scale = torch.tensor([1.0, 4, 0.3, 1, 3, 1])
    plain = z @ ridge_change(z.T @ z, z.T @ y, 0.3)
    scaled = (z * scale) @ ridge_change((z * scale).T @ (z * scale), (z * scale).T @ y, 0.3)
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [300, 5_000])  # one chunk, several
def test_ridge_router_equals_weighted_lstsq_with_intercept(tokens):
    g = torch.Generator().manual_seed(0)
    x, y, w = (
        torch.randn(tokens, 8, generator=g) + 1,
        torch.randn(tokens, 3, generator=g),
        torch.rand(tokens, generator=g),
    )
    weight, bias = WeightedRidge(x, w, ridge=1e-10).fit(y)
    a = np.concatenate([x.numpy(), np.ones((tokens, 1))], 1) * w.numpy()[:, None]
    expected = np.linalg.lstsq(a.astype(np.float64), (y * w[:, None]).numpy().astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(torch.cat([weight, bias[None]]).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_the_linear_router_beats_chance_by_far():
    moe, sample, _ = converted("coactivation", Plan(0, 1, 4, 12), tokens=2_000)
    own, _ = moe.gate(sample.input_TD, moe.experts)
    best = moe.experts.output_norms(sample.input_TD).argmax(1)
    assert (own.squeeze(1) == best).float().mean() > 0.4
