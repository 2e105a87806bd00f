"""How many experts run: any router's ranking, rules that meet a budget, what learns, adapters beside the model."""

import io
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from moesaic import AdaptConfig, InputError, registry
from moesaic.adaptation.budget import calibrate, count_errors
from moesaic.adaptation.learners.base import Batch, Steering, likelihoods
from moesaic.adaptation.learners.distill import Distill, count_gradient, relaxed
from moesaic.adaptation.learners.ppo import PPO, Drawn, clipped_gain, steer
from moesaic.adaptation.policy import make_policy
from moesaic.calibration.text import bundled
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.formats.adapter import build_selection
from moesaic.models.moe_block import Routing, find_blocks, routing_groups
from moesaic.models.router_scores import router_scores
from moesaic.moe.adaptive import BlockRanker, Decision, attach, decided_by
from moesaic.moe.counting import mean_experts
from moesaic.report.tables import show_adaptation
from moesaic.routing.selection.ada_k import AdaK
from moesaic.routing.selection.base import LayerSample, Ranking, mean_count
from moesaic.routing.selection.entropy import Entropy
from moesaic.routing.selection.layer_k import LayerK, least_error
from moesaic.routing.selection.learned_threshold import LearnedThreshold
from moesaic.routing.selection.relative import Relative
from moesaic.routing.selection.skip import Skip
from moesaic.routing.selection.threshold import Threshold
from moesaic.routing.selection.top_k import TopK
from moesaic.routing.selection.top_p import TopP
from moesaic.training.data import Samples
from test_moe_block import CHOSEN, EXPERTS, SIZES, STOCK, TOKENS, ours, stock

ALL = [*STOCK, "ours"]
UNDERSTOOD = [name for name in ALL if name != "phi-moe"]  # its second expert has a softmax of its own
RULES = ["threshold", "relative", "top-p", "entropy", "skip", "learned-threshold", "ada-k"]


def model_of(name):
    return ours() if name == "ours" else stock(name)


def ranking(*shares):
    """A ranking of one token a row, its shares falling."""
    shares_TN = torch.tensor(shares)
    index_TN = torch.arange(shares_TN.shape[1]).expand_as(shares_TN)
    return Ranking(index_TN, shares_TN, shares_TN, logarithmic=True)


def counts(selection, ranked, default=4):
    return selection.counts(
        ranked, torch.zeros(len(ranked.index_TN), 2), {"ratio": torch.tensor(0.5)}, default
    ).tolist()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_at_the_models_own_number_nothing_changes_by_a_bit(name):
    model = model_of(name)
    expected = model(TOKENS).logits
    with attach(model, TopK()):
        assert torch.equal(model(TOKENS).logits, expected)
    zeros = AdaK(penalty=-1.0, at_most=CHOSEN)  # a policy that always says the same
    with attach(model, zeros):
        assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_detached_without_a_trace(name):
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(TOKENS).logits
    attached = attach(model, TopK(k=1))
    assert not torch.equal(model(TOKENS).logits, expected)
    attached.detach()
    assert torch.equal(model(TOKENS).logits, expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(block.router._forward_hooks for block in find_blocks(model))


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_token_runs_no_expert_only_where_a_shared_one_runs(name):
    """A rule that no score passes is a smaller fixed number: 0 beside a shared expert, else 1."""
    model = model_of(name)
    shared = all(block.shared_experts for block in find_blocks(model))
    with attach(model, Threshold(threshold=1e9)):
        assert set(mean_experts(model, lambda: model(TOKENS)).by_layer) == {0.0 if shared else 1.0}
        found = model(TOKENS).logits
    with attach(model, TopP(p=0.0, at_least=0) if shared else TopK(k=1)):
        torch.testing.assert_close(model(TOKENS).logits, found)


@pytest.mark.parametrize("name", [name for name in UNDERSTOOD if name != "ours"])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_fewer_or_more_experts_equal_the_routers_own_other_number(name, count):
    """Renormalised or not, scaled or not, as the model's own code does it; shared experts as they are."""
    model = stock(name)
    with attach(model, TopK(k=count)):
        found = model(TOKENS).logits
    for block in find_blocks(model):
        assert block.router.top_k == CHOSEN
        block.router.top_k = count
    torch.testing.assert_close(found, model(TOKENS).logits, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_one_expert_of_phi_is_its_first():
    model = stock("phi-moe")
    [first, *_] = find_blocks(model)
    seen = []
    handle = first.watch(lambda _, routing: seen.append(routing))
    model(TOKENS)
    handle.remove()
    with attach(model, TopK(k=1)):
        handle = first.watch(lambda _, routing: seen.append(routing))
        model(TOKENS)
        handle.remove()
    own, one = seen
    assert one.top_k_index.shape[1] == 1 or (one.top_k_index[:, 1] == EXPERTS).all()
    kept = (own.top_k_index == one.top_k_index[:, :1]).nonzero()[:, 1]
    torch.testing.assert_close(one.top_k_weights[:, 0], own.top_k_weights.gather(1, kept[:, None])[:, 0])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_empty_slots_equal_masked_weights(name):
    """A token that runs one expert, beside one that runs two, gets what it gets with a weight of 0 for the other."""
    model = model_of(name)
    rankers = [BlockRanker(block) for block in find_blocks(model)]

    def some(number, ranked, hidden):
        return Decision(1 + torch.arange(len(hidden)) % 2)

    def masked(number, ranked, hidden):
        keep = (torch.arange(ranked.index_TN.shape[1]) < (1 + torch.arange(len(hidden)) % 2)[:, None]).float()
        return Decision(torch.full((len(hidden),), 2), keep)

    with decided_by(rankers, some):
        found = model(TOKENS).logits
        assert mean_experts(model, lambda: model(TOKENS)).by_layer == [1.5] * len(rankers)
    with decided_by(rankers, masked):
        torch.testing.assert_close(found, model(TOKENS).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name != "llama4"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "moesaic"])
@torch.no_grad()
def test_every_implementation_of_experts_knows_empty_slots(name, experts):
    model = model_of(name)
    rule = Threshold(threshold=-1e9, at_least=1, at_most=2) if name == "ours" else TopP(p=0.25)
    with attach(model, rule):
        expected = model(TOKENS).logits
        model.set_experts_implementation(experts)
        assert expected.isfinite().all()
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-3, atol=1e-5)


def test_router_scores_are_found_by_asking():
    assert router_scores(find_blocks(stock("mixtral"))[0]).renormalised
    assert not router_scores(find_blocks(stock("olmoe"))[0]).renormalised
    assert router_scores(find_blocks(stock("deepseek-v3"))[0]).scale == pytest.approx(2.5, rel=1e-3)
    assert router_scores(find_blocks(stock("phi-moe"))[0]).own_only


def test_rules_say_how_many():
    ranked = ranking([0.6, 0.3, 0.06, 0.04], [0.25, 0.25, 0.25, 0.25])
    assert counts(Threshold(threshold=0.05), ranked) == [3, 4]
    assert counts(Threshold(threshold=0.7, at_least=1), ranked) == [1, 1]
    assert counts(Threshold(threshold=0.7), ranked) == [0, 0]  # DSMoE's rule lets a token run none
    assert counts(Relative(threshold=0.5), ranked) == [2, 4]
    assert counts(Relative(threshold=0.6, at_least=2), ranked) == [2, 4]  # ik_llama.cpp's -ser 2,0.6
    assert counts(TopP(p=0.85), ranked) == [2, 4]
    assert counts(TopP(p=0.5), ranked) == [1, 2]
    assert counts(Entropy(scale=1.0), ranked) == [2, 4]  # exp(entropy) is 2.6 and 4
    assert counts(Skip(), ranked) == [2, 4]
    assert counts(Skip(), ranked, default=3) == [2, 3]  # never more than the model's own
    assert counts(TopK(k=3), ranked) == [3, 3]
    assert counts(Relative(threshold=0.0, at_most=2), ranked) == [2, 2]


def test_ada_k_takes_the_likeliest_number_or_draws():
    weight = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    ranked = ranking(*[[0.4, 0.3, 0.2, 0.1]] * 3)
    rule = AdaK()
    assert rule.counts(ranked, hidden, {"weight": weight}, 2).tolist() == [2, 3, 1]
    tilted = AdaK(penalty=2.5)
    assert tilted.counts(ranked, hidden, {"weight": weight}, 2).tolist() == [1, 1, 1]
    torch.manual_seed(0)
    drawn = AdaK(sample=True).count(torch.tensor([[0.0, math.log(3.0)]]).expand(20_000, 2))
    assert (drawn == 2).double().mean() == pytest.approx(0.75, abs=0.02)
    survival = rule.keep(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), 1.0)
    torch.testing.assert_close(survival, torch.tensor([[1.0, 0.75, 0.5, 0.25]]))


def test_a_learned_threshold_starts_as_the_threshold():
    ranked = ranking([0.6, 0.3, 0.06, 0.04], [0.4, 0.3, 0.2, 0.1])
    rule = LearnedThreshold(threshold=math.log(0.15))
    parameters = rule.parameters(SimpleNamespace(hidden_size=2, num_experts=4))
    assert rule.counts(ranked, torch.randn(2, 2), parameters, 2).tolist() == counts(Threshold(threshold=0.15), ranked)


def test_budgets_are_kept_by_what_at_least_and_at_most_allow():
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(2_000, 4, generator=generator).softmax(-1).sort(-1, descending=True).values
    ranked = Ranking(torch.arange(4).expand(2_000, 4), shares, shares, logarithmic=True)
    rule = Skip(at_least=2)
    sample = LayerSample(ranked, rule.evidence(ranked, shares, {"ratio": torch.zeros(())}), 4, {})
    fitted, parameters = rule.fit([sample, sample], 2.4)
    count = fitted.counts(ranked, shares, parameters[0], 4).double()
    assert count.mean() == pytest.approx(2.4, rel=0.02)
    assert count.min() == 2
    errors = torch.tensor([0.5, 0.2, 0.1, 0.0])
    _, counts_ = LayerK(at_most=2).fit([sample._replace(errors_K=errors)] * 2, 2.0)
    assert [int(c["count"]) for c in counts_] == [2, 2]
    assert TopK(k=1, at_least=3).counts(ranked, shares, {}, 4).unique().tolist() == [3]


def test_the_price_of_an_expert_is_finite_for_every_learning_rule():
    """A policy's logits may all be raised without a change, so it is loosened by the number of experts instead."""
    model = stock("qwen3-moe")
    for selection in (AdaK(), LearnedThreshold(threshold=-1.7)):
        policy, steering = make_policy(model, selection), Steering(mean=1.5)
        for values in policy.parameters:
            torch.nn.init.normal_(values["weight"], std=0.1)
        learner = Distill()
        learner.prepare(policy, steering, batch_of())
        learner.step(policy, steering, batch_of(), lambda: None)
        assert 0 <= steering.price < 1


def test_a_token_without_an_expert_has_a_finite_gradient():
    scores = router_scores(find_blocks(stock("mixtral"))[0])
    keep = torch.zeros(1, 3, requires_grad=True)
    weights = scores.weigh(torch.tensor([[0.5, 0.3, 0.2]]), keep)
    assert weights.tolist() == [[0.0, 0.0, 0.0]]
    weights.sum().backward()
    assert keep.grad.abs().max() < 10


def test_least_error_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    errors = [torch.rand(4, generator=generator).sort(descending=True).values for _ in range(4)]
    for total in range(4, 17):
        every = (c for c in itertools.product(range(1, 5), repeat=4) if sum(c) == total)
        best = min(every, key=lambda c: sum(float(e[k - 1]) for e, k in zip(errors, c, strict=True)))
        assert least_error(errors, total) == list(best)


@pytest.mark.parametrize("name", [name for name in ALL if name != "llama4"])
def test_errors_of_fewer_experts_are_those_of_the_block(name):
    model = model_of(name)
    [*_, block] = find_blocks(model)
    x = torch.randn(7, block.hidden_size, generator=torch.Generator().manual_seed(0))
    ranker = BlockRanker(block)
    with torch.no_grad():
        arguments = (x, block.experts) if name == "ours" else (x,)
        ranked = ranker.rank(x, block.router(*arguments))
        outputs = []
        for count in (1, 2):
            routing = ranked.route(Decision(torch.full((7,), count)))
            outputs.append(block.experts(x, *Routing(*routing)) if routing.top_k_index.max() < EXPERTS else None)
        found = count_errors(ranker, ranked.ranking, x)
    assert torch.equal(found[:, 1], torch.zeros(7))
    if outputs[0] is not None:
        expected = (outputs[1] - outputs[0]).square().sum(-1) / outputs[1].square().sum(-1)
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "ours"])
def test_a_rule_meets_its_budget(name, rule):
    model = model_of(name)
    tokens = torch.randint(64, (16, 64), generator=torch.Generator().manual_seed(0))
    selection = registry.build("selection", rule)
    selection = registry.build("selection", f"{rule}:at_least=1")
    blocks = find_blocks(model)
    parameters = [dict(selection.parameters(block)) for block in blocks]
    if rule == "ada-k":  # a policy that says something
        parameters = [{"weight": torch.randn_like(values["weight"])} for values in parameters]
    samples = Samples(tokens, torch.ones_like(tokens, dtype=torch.bool))
    found = calibrate(model, [BlockRanker(b) for b in blocks], selection, parameters, 1.5, samples)
    if not (rule == "skip" and name == "deepseek-v3"):  # two sigmoids lie close together
        assert found.experts_per_token == pytest.approx(1.5, rel=0.02)
    with attach(model, found.selection, found.parameters):
        ran = mean_experts(model, lambda: model(tokens, use_cache=False)).by_layer
    assert sum(ran) / len(ran) == pytest.approx(found.experts_per_token, rel=0.01)


def test_the_budget_of_a_rule_is_met_on_its_samples():
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(3):
        shares = torch.rand(500, 8, generator=generator).softmax(-1).sort(-1, descending=True).values
        ranked = Ranking(torch.arange(8).expand(500, 8), shares, shares, logarithmic=True)
        samples.append(LayerSample(ranked, TopP().evidence(ranked, shares, {}), 4, {}))
    fitted, _ = TopP().fit(samples, 2.6)
    assert mean_count(fitted, samples) == pytest.approx(2.6, rel=0.01)


def test_ppos_gain_and_loss_equal_an_example_by_hand():
    ratio, advantage = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert clipped_gain(ratio, advantage, 0.2).tolist() == pytest.approx([1.2, 0.5, -1.5, -0.8])
    zeros, ranker = {"weight": torch.zeros(2, 3)}, SimpleNamespace(ranks=2)
    policy = SimpleNamespace(parameters=[zeros, zeros], rankers=[ranker, ranker], selection=AdaK(), default=2)
    hidden, half = torch.ones(2, 3), torch.full((2,), math.log(0.5))
    drawn = [Drawn(hidden, torch.tensor([0, 1]), half, torch.tensor([1, 2]))] * 2
    loss, mean = PPO(gamma=0.5).loss(policy, drawn, torch.tensor([0.3, -0.1]), torch.ones(2), price=0.01)
    assert mean == pytest.approx(1.5)
    # ratios are 1; advantages are halved in the first of two layers: mean of -(0.3 - 0.1) / 2 times 0.5 and 1
    assert loss.item() == pytest.approx(-0.1 * (0.5 + 1) / 2 + 0.01 * 1.5)
    policy.selection = AdaK(at_most=1)  # both numbers run one expert, and that is what the price is of
    loss, mean = PPO(gamma=0.5).loss(policy, drawn, torch.tensor([0.3, -0.1]), torch.ones(2), price=0.01)
    assert mean == pytest.approx(1)
    assert loss.item() == pytest.approx(-0.1 * (0.5 + 1) / 2 + 0.01)


def test_before_an_update_the_ratio_is_1_with_groups_of_experts_too():
    """DeepSeek-V3's router allows fewer experts than there are; the policy's numbers end there."""
    torch.manual_seed(0)
    config_class, fields, *_ = STOCK["deepseek-v3"]
    groups = {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | fields | groups)).eval()
    policy = make_policy(model, AdaK())
    seen = []

    def draw(number, ranking, hidden):
        logits = policy.selection.evidence(ranking, hidden, policy.parameters[number])
        first = torch.zeros(len(hidden), dtype=torch.long)
        seen.append(Drawn(hidden, first, logits.log_softmax(-1)[:, 0], first + 1))
        return Decision(first + 1)

    with torch.no_grad():
        policy.logits(TOKENS, draw)
    ranks = {ranker.ranks for ranker in policy.rankers}
    assert max(ranks) < model.config.n_routed_experts
    ones = torch.ones(len(seen[0].hidden_TD))
    loss, mean = PPO(gamma=1.0).loss(policy, seen, ones, ones, price=0.0)
    assert loss.item() == pytest.approx(-1)
    assert 1 < mean <= max(ranks)


@torch.no_grad()
def test_groups_that_a_router_does_not_look_at_limit_nothing():
    """DeepSeek-V2-Lite's: it has groups of experts, and takes the best of all."""
    config_class, fields, *_ = STOCK["deepseek-v2"]
    groups = {"n_group": EXPERTS // 2, "topk_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | fields | groups)).eval()
    assert routing_groups(find_blocks(model)[0].router) == 1
    with attach(model, TopK(k=EXPERTS)):
        assert mean_experts(model, lambda: model(TOKENS)).by_layer == [EXPERTS] * len(find_blocks(model))


def test_the_price_is_steered_to_the_budget():
    assert steer(0.003, 3.0, 3.0) == 0.003
    assert steer(0.003, 3.3, 3.0) > 0.003 > steer(0.003, 2.7, 3.0)
    price, mean = 0.003, 4.0
    for _ in range(200):  # an agent that spends less as the price rises
        price = steer(price, mean, 2.0)
        mean = 1 + 3 / (1 + price / 0.05)
    assert mean == pytest.approx(2.0, rel=0.01)


def test_a_bandit_learns_which_number_is_best():
    """The arms are numbers of experts: the reward of one kind of token is highest for 1, of the other for 3."""
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    policy = SimpleNamespace(
        parameters=[{"weight": weight}], rankers=[SimpleNamespace(ranks=4)], selection=AdaK(), default=4
    )  # fmt: skip
    hidden = torch.eye(2).repeat(64, 1)
    best = torch.tensor([0, 2]).repeat(64)
    optimizer = torch.optim.AdamW(policy.parameters[0].values(), lr=0.05)
    generator, method = torch.Generator().manual_seed(0), PPO()
    for _ in range(100):
        with torch.no_grad():
            log_probs = (hidden @ policy.parameters[0]["weight"].T).log_softmax(-1)
            index = log_probs.exp().multinomial(1, generator=generator)
        drawn = [Drawn(hidden, index[:, 0], log_probs.gather(1, index)[:, 0], 1 + index[:, 0])]
        reward = -(index[:, 0] - best).abs().float()
        for _ in range(method.epochs):
            loss, _ = method.loss(policy, drawn, reward, torch.ones(128), price=1e-3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert AdaK().count((torch.eye(2) @ policy.parameters[0]["weight"].T).detach()).tolist() == [1, 3]


def batch_of(count=2, length=24, seed=0):
    tokens = torch.randint(64, (count, length), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.Generator().manual_seed(seed))


def test_a_relaxed_count_is_the_hard_one_with_the_gradient_of_its_probability():
    evidence = torch.tensor([[2.0, 0.3, -0.2, -3.0]], requires_grad=True)
    rule = LearnedThreshold(threshold=0.0)
    decision = relaxed(rule, evidence, 4, 1.0)
    assert decision.keep_TN.detach().tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert decision.count_T.item() == 4  # what may yet run is run, with factor 0
    decision.keep_TN.sum().backward()
    torch.testing.assert_close(evidence.grad, count_gradient(rule, evidence.detach(), 1.0))
    assert evidence.grad[0, 0] == 0  # the best expert always runs
    most = LearnedThreshold(threshold=0.0, at_most=2)
    assert count_gradient(most, evidence.detach(), 1.0)[0, 2:].tolist() == [0.0, 0.0]  # these never do


@pytest.mark.parametrize("name", ["qwen3-moe", "olmoe", "ours"])
def test_distillations_gradient_is_that_of_the_divergence(name):
    """By a rank's evidence it is the gradient by the factor on its weight, times the slope of its probability."""
    model = model_of(name)
    policy = make_policy(model, LearnedThreshold(threshold=0.0, at_most=3))
    batch = batch_of(count=1)
    learner = Distill(temperature=1.0)
    spread = []
    with decided_by(policy.rankers, policy.watch(lambda n, r, h: spread.append(r.levels_TN))):
        model(batch.tokens_NL)
    policy.selection = policy.selection.with_budget(float(spread[0][:, 1].median()))
    samples = []
    passed = learner.some(policy, batch.tokens_NL, batch.scored_NL, 1.0, samples)

    layer, token, slot = len(passed.layers) - 1, 3, 1
    step = 1e-2

    def divergence(factor):
        def decide(number, ranked, hidden):
            evidence = policy.selection.evidence(ranked, hidden, policy.parameters[number])
            decision = relaxed(policy.selection, evidence, CHOSEN, 1.0)
            keep = decision.keep_TN.detach().clone()
            if number == layer:
                keep[token, slot] += factor
            return Decision(decision.count_T, keep)

        with torch.no_grad():
            student = policy.logits(batch.tokens_NL, decide)[0, :-1].log_softmax(-1)
            teacher = policy.logits(batch.tokens_NL, None)[0, :-1].log_softmax(-1)
        return kl_div(student, teacher, log_target=True, reduction="sum").item()

    slope = (divergence(step) - divergence(-step)) / (2 * step)
    evidence, leaf = passed.layers[layer]
    probability = torch.sigmoid(evidence.detach()[token, slot] - policy.selection.threshold)
    expected = slope * float(probability * (1 - probability))
    assert leaf.grad[token, slot].item() == pytest.approx(expected, rel=0.05, abs=2e-5)


@pytest.mark.parametrize("learner", [PPO(warm="none"), PPO(), Distill()])
def test_a_step_moves_the_policy_and_never_the_model(learner):
    model = stock("qwen3-moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy = make_policy(model, AdaK())
    for values in policy.parameters:
        torch.nn.init.normal_(values["weight"], std=0.1)
    start, steering, updates = policy.values(), Steering(mean=1.5), []
    learner.prepare(policy, steering, batch_of())
    optimizer = torch.optim.SGD(list(policy.named().values()), lr=1.0)

    def update():
        updates.append([p.grad.norm().item() for p in policy.named().values()])
        optimizer.step()
        optimizer.zero_grad()

    if learner.warm_share:
        assert math.isfinite(learner.warm_step(policy, steering, batch_of(), update).loss)
    outcome = learner.step(policy, steering, batch_of(), update)
    assert all(map(math.isfinite, outcome))
    assert all(norm > 0 for norms in updates for norm in norms)
    assert all(not torch.equal(a["weight"], b["weight"]) for a, b in zip(start, policy.values(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_ppo_runs_the_model_twice_whatever_the_epochs():
    model = stock("qwen3-moe")
    policy = make_policy(model, AdaK())
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for epochs in (1, 4):
        calls.clear()
        PPO(epochs=epochs).step(policy, Steering(mean=1.5, price=0.003), batch_of(), lambda: None)
        assert len(calls) == 2


def test_likelihoods_are_of_the_next_token():
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    found = likelihoods(logits, tokens)
    for n, i in itertools.product(range(2), range(4)):
        assert found[n, i] == pytest.approx(logits[n, i].log_softmax(-1)[tokens[n, i + 1]].item(), abs=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("moe")
    config_class, fields, *_ = STOCK["qwen3-moe"]
    torch.manual_seed(0)
    sizes = SIZES | fields | {"num_experts_per_tok": 4, "vocab_size": 1024, "max_position_embeddings": 256}
    AutoModelForCausalLM.from_config(config_class(**sizes)).save_pretrained(made)
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(made)
    return made


QUICK = {"window": 32, "samples": 64, "held_out": 4, "tokens": 1_024, "batch": 2, "target_active": 0.5}


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["top-p", "threshold", "layer-k", "skip", "top-k", "ada-k"])
def test_an_adapter_is_the_same_where_experts_come_and_go(folder, tmp_path, run, method):
    """With two fifths of the experts in memory the same rule is found, to the last bit."""
    config = AdaptConfig(method=method, steps=3, device="cpu", **QUICK)
    whole = moesaic.adapt(folder, tmp_path / "whole", config)
    asked = ["--samples", 64, "--window", 32, "--tokens", 1024, "--batch", 2, "--target-active", 0.5, "--steps", 3]
    (tmp_path / "r.yaml").write_text("held_out: 4\n")
    code, out, err = run("adapt", folder, tmp_path / "out", "--method", method, *asked, "--recipe", tmp_path / "r.yaml",
                         "--expert-memory", "40%", "--cache", "lru", "--device", "cpu", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["experts_per_token"] == whole.experts_per_token
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("whole", "out")]
    assert configs[0]["moesaic_selection"] == configs[1]["moesaic_selection"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--expert-memory", "30%"), "--method learned-threshold is trained by gradients through the experts"),
        (("--expert-memory", "30%", "--method", "top-p", "--inside"), "--inside writes the whole model"),
        (("--expert-memory", "none", "--method", "top-p"), "--expert-memory"),
        (("--cache", "lru", "--method", "top-p"), "--cache lru has no use without --expert-memory"),
        (("--expert-memory", "30%", "--cache", "lrv", "--method", "top-p"), "Did you mean 'lru'?"),
    ],
)
def test_what_does_not_go_with_experts_that_come_and_go(folder, tmp_path, run, arguments, says):
    code, _, err = run("adapt", folder, tmp_path / "out", *arguments)
    assert (code, says in " ".join(err.split())) == (2, True), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["top-p", "layer-k", "skip", "learned-threshold", "ada-k"])
def test_an_adapter_comes_back_as_it_was_made(folder, tmp_path, method):
    before = snapshot(folder)
    result = moesaic.adapt(folder, tmp_path / "out", AdaptConfig(method=method, steps=3, **QUICK))
    assert snapshot(folder) == before  # the model's files are never changed
    assert result.experts_per_token == pytest.approx(2.0, rel=0.1)
    assert result.calibrated_experts_per_token == pytest.approx(2.0, rel=0.02 if method != "layer-k" else 0.3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    model, tokenizer = moesaic.load(folder, adapter=tmp_path / "out", dtype=torch.float32)
    found = moesaic.evaluate(model, tokenizer, window=128, max_tokens=512)
    again, _ = moesaic.load(folder, adapter=tmp_path / "out", dtype=torch.float32)
    assert moesaic.evaluate(again, tokenizer, window=128, max_tokens=512).perplexity == found.perplexity
    assert sum(mean_experts(model, lambda: model(TOKENS)).by_layer) / 2 < 4
    plain, _ = moesaic.load(folder, dtype=torch.float32)
    assert sum(mean_experts(plain, lambda: plain(TOKENS)).by_layer) / 2 == 4
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["result"]["active"] == result.active


@pytest.mark.parametrize("method", ["learned-threshold", "ada-k"])
def test_what_was_stopped_and_resumed_equals_what_was_not(folder, tmp_path, method):
    config = AdaptConfig(method=method, steps=6, evaluations=6, **QUICK)
    whole = moesaic.adapt(folder, tmp_path / "whole", config)

    def stop(done, count, note=""):
        if "step 4" in note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moesaic.adapt(folder, tmp_path / "out", config, progress=stop)
    assert (tmp_path / "out.training").is_dir()
    steps = []
    resumed = moesaic.adapt(folder, tmp_path / "out", config, progress=lambda d, c, note="": steps.append(note))
    assert not any("step 1," in note or "step 3," in note for note in steps)
    assert resumed.held_out_loss == whole.held_out_loss
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter.safetensors"
    ).read_bytes()
    assert not (tmp_path / "out.training").exists()


def test_the_words_of_ik_llama_cpp_have_the_rules_options(folder, tmp_path):
    """Those at their defaults too, which the rule's text leaves out."""
    result = moesaic.adapt(folder, tmp_path / "out", AdaptConfig(method="relative", **QUICK))
    for method, said in (("relative", "-ser 1,0.5000"), ("relative:threshold=0.25,at_least=2", "-ser 2,0.2500")):
        console = Console(file=io.StringIO(), width=200)
        show_adaptation(console, replace(result, method=method))
        assert f"{said} --override-kv ARCH.expert_used_count=int:{result.num_experts}" in console.file.getvalue()


def test_inside_a_converted_model(tmp_path):
    settings = {"tokens": 1_024, "plan": "S2A4E8", "held_out_tokens": 256, "collapse_ratio": 1.01}
    moesaic.convert("tiny", tmp_path / "moe", moesaic.ConvertConfig(**settings), force=True)
    quick = QUICK | {"window": 64, "samples": 32}
    beside = moesaic.adapt(tmp_path / "moe", tmp_path / "adapter", AdaptConfig(method="threshold", **quick))
    within = moesaic.adapt(tmp_path / "moe", tmp_path / "out", AdaptConfig(method="threshold", inside=True, **quick))
    assert within.method == beside.method
    model, _ = moesaic.load(tmp_path / "out", dtype=torch.float32)
    other, _ = moesaic.load(tmp_path / "moe", adapter=tmp_path / "adapter", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert model.config.selection == within.method
    assert moesaic.inspect(tmp_path / "out").moe["selection"] == within.method
    measured = moesaic.inspect(tmp_path / "out").metrics
    before = moesaic.inspect(tmp_path / "moe").metrics.perplexity
    assert measured.perplexity != before
    assert measured.collapsed  # by the conversion's own collapse_ratio
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"selection `{within.method}`" in card
    assert "Then adapted (`threshold`): " in card
    assert f"perplexity {before:.3f} before, {measured.perplexity:.3f} after" in card
    fixed = moesaic.adapt(tmp_path / "moe", tmp_path / "fixed", AdaptConfig(method="top-k", inside=True, **quick))
    few = moesaic.inspect(tmp_path / "fixed").metrics
    assert (fixed.method, few.plan) == ("top-k:k=2", "S2A2E8")
    assert json.loads((tmp_path / "fixed" / "config.json").read_text())["num_experts_per_tok"] == 2
    assert few.format == moesaic.inspect(tmp_path / "moe").metrics.format
    assert "S2A2E8" in (tmp_path / "fixed" / "README.md").read_text()
    with pytest.raises(InputError, match="varies by token already"):
        moesaic.adapt(tmp_path / "out", tmp_path / "again", AdaptConfig(method="threshold", **quick))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_active": 0.1}, "give a share from 0.25 to 1"),
        ({"target_active": 1.2}, "at most 1"),
        ({"method": "topp"}, "Did you mean 'top-p'"),
        ({"method": "top-p", "learner": "ppo"}, "does not learn"),
        ({"method": "learned-threshold", "learner": "ppo"}, "ppo trains ada-k"),
        ({"method": "ada-k", "learner": "pppo"}, "Did you mean 'ppo'"),
        ({"allow_zero": True}, "this model has none"),
        ({"method": "top-p:at_most=1", "target_active": 0.75}, "give a share from 0.25 to 0.25"),
        ({"method": "top-p:at_least=3,at_most=2"}, "at_least 3 is more than at_most 2"),
        ({"method": "top-p:at_most=-1"}, "option at_most of selection 'top-p' is -1"),
        ({"inside": True}, "leave out --inside"),
        ({"window": 4_096}, "more than the model's longest"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(folder, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        moesaic.adapt(folder, tmp_path / "out", AdaptConfig(**QUICK | changes))
    assert list(tmp_path.iterdir()) == []


def test_whole_numbers_meet_few_budgets_and_one_that_is_given_is_kept(folder, tmp_path, run):
    options = ("--window", "64", "--samples", "16", "--device", "cpu")
    code, _, err = run("adapt", folder, tmp_path / "a", "--method", "top-k", "--target-active", "0.6", *options)
    assert code == 0, err
    assert "top-k runs one whole number of experts for all tokens" in " ".join(err.split())
    found = moesaic.adapt(folder, tmp_path / "b", AdaptConfig(**QUICK | {"method": "top-k:k=3", "target_active": 0.5}))
    assert found.experts_per_token == 3
    code, _, err = run("adapt", folder, tmp_path / "c", "--method", "relative", "--target-active", "0.75", *options)
    assert "--override-kv ARCH.expert_used_count=int:6" in " ".join(err.split())


def test_a_dense_model_has_no_experts_to_choose_from(tmp_path):
    with pytest.raises(InputError, match="is dense"):
        moesaic.adapt("tiny", tmp_path / "out", AdaptConfig(**QUICK))
    with pytest.raises(InputError, match="is dense"):
        moesaic.load("tiny", select="top-p:p=0.5")


@pytest.mark.parametrize("rule", ["top-k:k=99", "top-p:p=0.5,at_least=99"])
def test_a_rule_wants_no_more_experts_than_there_are(folder, rule):
    with pytest.raises(InputError, match=r"=99 is more than the 6 routed experts of a layer; give 6 or less"):
        moesaic.load(folder, select=rule)


def test_an_adapter_knows_its_model(folder, tmp_path, run):
    moesaic.adapt(folder, tmp_path / "out", AdaptConfig(method="top-p", **QUICK))
    with pytest.raises(InputError, match="another one"):
        moesaic.load("tiny", adapter=tmp_path / "out")
    with pytest.raises(InputError, match="give one of them"):
        moesaic.load(folder, adapter=tmp_path / "out", select="top-p")
    with pytest.raises(InputError, match="holds no adapter"):
        moesaic.load(folder, adapter=folder)
    with pytest.raises(InputError, match="make an adapter first"):
        build_selection("ada-k")
    code, _, err = run("generate", tmp_path / "out", "The first")
    assert code == 2
    assert "give that model, and the adapter with --adapter" in err.replace("\n", " ")
    code, out, _ = run(
        "generate", folder, "The first", "--adapter", tmp_path / "out", "--max-new-tokens", "3", "--json"
    )
    assert code == 0
    assert json.loads(out)["completion"] is not None
    (tmp_path / "out" / "adapter.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        moesaic.load(folder, adapter=tmp_path / "out")


def test_rules_at_run_time(folder, run):
    code, out, _ = run("evaluate", folder, "--select", "top-k:k=1", "--window", "128", "--max-tokens", "256", "--json")
    assert code == 0
    few = json.loads(out)["perplexity"]
    _, out, _ = run("evaluate", folder, "--window", "128", "--max-tokens", "256", "--json")
    assert json.loads(out)["perplexity"] != few
    code, out, _ = run(
        "benchmark", folder, "--select", "top-k:k=1", "--prompt", "32", "--new", "2", "--rounds", "1", "--json"
    )
    assert code == 0
    speed = json.loads(out)["decode"]["1"]
    assert speed["experts_touched"] == 1
    assert speed["limit"] > 1


def test_tiny_moe_is_balanced_and_needs_its_experts():
    """Every expert of every layer has tokens, none more than a quarter of them; and fewer experts predict worse."""
    model, tokenizer = moesaic.load("tiny-moe", dtype=torch.float32)
    tokens = torch.tensor(tokenizer("\n\n".join(d.text for d in bundled("heldout")), verbose=False)["input_ids"])[
        :4_096
    ]
    loads = {}

    def count(number):
        def see(hidden, routing):
            loads[number] = torch.bincount(routing.top_k_index.flatten(), minlength=16) / len(hidden)

        return see

    blocks = find_blocks(model)
    handles = [block.watch(count(number)) for number, block in enumerate(blocks)]
    with torch.no_grad():
        model(tokens.view(4, -1), use_cache=False)
    for handle in handles:
        handle.remove()
    shares = torch.stack(list(loads.values()))
    assert shares.shape == (6, 16)
    torch.testing.assert_close(shares.sum(1), torch.full((6,), 4.0))
    assert shares.min() > 0
    assert shares.max() < 1
    losses = []
    for count_ in (4, 3, 2, 1):
        with attach(model, TopK(k=count_)):
            found = moesaic.evaluate(model, tokenizer, window=512, max_tokens=4_096)
        losses.append(found.perplexity)
    assert losses == sorted(losses)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["learned-threshold", "ada-k"])
def test_two_processes_equal_one(folder, tmp_path, method):
    options = [
        folder,
        "--method",
        method,
        "--window",
        32,
        "--samples",
        32,
        "--batch",
        4,
        "--steps",
        3,
        "--tokens",
        1024,
    ]
    options += ["--target-active", 0.5, "--device", "cpu", "--dtype", "float32", "--json"]
    options += ["--learner", "ppo:warm='none',epochs=1" if method == "ada-k" else "distill"]
    found = {}
    for name, launch in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        command = [sys.executable, *launch, "-m", "moesaic.cli", "adapt", *options]
        command.insert(command.index(folder) + 1, tmp_path / name)
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, timeout=600,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        assert result["processes"] == 1 + (name == "two")
        found[name] = load_file(tmp_path / name / "adapter.safetensors")
    assert found["one"].keys() == found["two"].keys()
    if method == "learned-threshold":  # what PPO draws differs between the processes
        one, two = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in found.values())
        assert one.norm() > 0
        assert (one - two).norm() < 0.3 * one.norm()
