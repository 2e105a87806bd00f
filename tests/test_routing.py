from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import linear

from conftest import block_for, random_sample
from moesaic import ConvertConfig, InputError, Plan, convert, registry
from moesaic.routing.base import make_gate, unit_scores
from moesaic.routing.linear import Linear
from moesaic.routing.mlp import MLPGate
from moesaic.routing.representative import balance
from moesaic.routing.selection import Selection


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


@pytest.mark.parametrize("router", ["representative", "softmax"])
def test_routers_with_weights_give_an_empty_slot_none(router):
    """A rule from outside leaves slots empty though the gate's own selection does not."""
    moe = block_for(random_sample(), Plan(0, 2, 4, 12), router)
    scores = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 4]] * 5)
    weights = moe.gate.weigh(scores, index, torch.float32).top_k_weights
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]] * 5))


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


CONFIG = SimpleNamespace(
    hidden_size=8, num_experts=4, num_experts_per_tok=2, router="linear", router_hidden_size=8, selection="top-k"
)


def gate_with(selection, **fields):
    gate = make_gate(SimpleNamespace(**vars(CONFIG) | {"selection": selection} | fields))
    gate.weight.data.copy_(torch.eye(4, 8))
    return gate.requires_grad_(False)


@pytest.mark.parametrize(
    ("selection", "index"),
    [
        ("top-k", [[0, 2], [1, 3]]),
        ("threshold:threshold=0.9", [[0, 2], [1, 4]]),
        ("relative:threshold=0.5", [[0, 4], [1, 3]]),  # of softmax shares: e^-1 is less than half
    ],
)
def test_selections_say_which_and_how_many(selection, index):
    x = torch.zeros(2, 8)
    x[0, :4], x[1, :4] = torch.tensor([3.0, 0.1, 2.0, 0.3]), torch.tensor([0.1, 1.0, 0.2, 0.6])
    routing = gate_with(selection)(x, None)
    assert routing.top_k_index.tolist() == index
    assert torch.equal(routing.top_k_weights, (routing.top_k_index < 4).float())


@pytest.mark.parametrize("selection", ["threshold:threshold=0.9", "top-p:p=0.5", "relative:threshold=0.5"])
def test_a_rule_reads_the_constant_that_a_router_adds(selection):
    """A score and a constant that cancel out choose what no score would."""
    x = torch.zeros(1, 8)
    x[0, :4] = torch.tensor([3.0, 1.0, 2.0, 0.0])
    gate, plain = gate_with(selection), gate_with(selection)
    gate.e_score_correction_bias.data.copy_(torch.tensor([-3.0, 0.0, 0.0, 5.0]))
    moved = x.clone()
    moved[0, :4] += gate.e_score_correction_bias
    assert gate(x, None).top_k_index.tolist() == plain(moved, None).top_k_index.tolist()


@dataclass(frozen=True, kw_only=True)
class AsManyAsItLearns(Selection):
    """Tokens say how many experts run: the arg-max of a bias-free linear map."""

    dynamic_top_k: ClassVar[bool] = True

    def parameters(self, config):
        return {"allocator": torch.zeros(config.num_experts, config.hidden_size)}

    def select(self, scores_TE, hidden_TD, gate):
        count_T = 1 + (hidden_TD @ gate.selection_parameters["allocator"].T).argmax(-1)
        order_TE = scores_TE.argsort(-1, descending=True)
        return order_TE.masked_fill(torch.arange(4) >= count_T[:, None], 4)


def test_a_selection_may_learn_and_is_saved_with_the_gate():
    gate = gate_with(f"{__name__}:AsManyAsItLearns")
    assert "selection_parameters.allocator" in gate.state_dict()
    gate.selection_parameters["allocator"][2, 0] = 1.0  # two experts more where the first channel is large
    x = torch.zeros(2, 8)
    x[0, 0], x[1, 0] = 5.0, -5.0
    assert ((gate(x, None).top_k_index < 4).sum(-1) == torch.tensor([3, 1])).all()


@dataclass(frozen=True, kw_only=True)
class Ahead(Linear):
    scope: ClassVar[str] = "model"


def test_a_router_ahead_of_the_model_is_not_fitted_layer_by_layer():
    with pytest.raises(InputError, match="decides ahead of the whole model"):
        convert("tiny", "nowhere", ConvertConfig(partition="coactivation", router=Ahead()))
