"""Upcycling: copies of the whole FFN behind a softmax, and their training as in MoE-LLaVA."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from conftest import QUICK, block_for, random_sample
from moesaic import ConvertConfig, FinetuneConfig, InputError, Plan, registry
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.conversion.prepare import prepare
from moesaic.formats.converted import Converted
from moesaic.moe.modeling import moe_blocks
from moesaic.training.expert_load import balance_loss

UPCYCLE = ConvertConfig(partition="upcycle", tokens=1_024, window=64, held_out_tokens=256)
IMPLEMENTATIONS = ["eager", "moesaic", "batched_mm", "grouped_mm", "moesaic_triton"]


def upcycled(options="", dtype=torch.float32, router="softmax"):
    """A block of whole experts, the sample that it was made of, and its partition."""
    sample, partitioner = random_sample(dtype=dtype), registry.build("partition", f"upcycle:{options}")
    plan = partitioner.shape(1.0, 1.0, sample.ffn.intermediate_size)
    partition = partitioner.split(sample, plan, torch.Generator())
    moe = block_for(sample, plan, "softmax")
    gate = registry.build("router", router).fit(sample, partition, plan.num_experts_per_tok)
    moe.load_dense(sample.ffn, partition.shared, partition.experts, gate)
    return moe, sample, partition


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, metrics) of `tiny`, upcycled."""
    folder = tmp_path_factory.mktemp("upcycled") / "tiny"
    return folder, moesaic.convert("tiny", folder, UPCYCLE)


# mathematics


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", ["", "experts=3,active=1", "experts=8,active=8"])
@torch.no_grad()
def test_upcycled_equals_dense_in_every_implementation(implementation, options):
    moe, sample, partition = upcycled(options)
    moe.config._experts_implementation = moe.experts.config._experts_implementation = implementation
    assert partition.is_whole(48)
    for x_TD, y_TD in ((sample.input_TD, sample.output_TD), (sample.input_TD[:1], sample.output_TD[:1])):
        torch.testing.assert_close(moe(x_TD), y_TD)


@pytest.mark.parametrize("active", [1, 2, 4])
def test_weights_are_the_softmax_of_those_that_run(active):
    moe, sample, _ = upcycled(f"active={active}")
    share_TE = (sample.input_TD @ moe.gate.weight.T).softmax(-1)
    index_TK, weights_TK = moe.gate(sample.input_TD, moe.experts)
    chosen_TK = share_TE.topk(active).values
    torch.testing.assert_close(weights_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True))
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(len(weights_TK)))
    torch.testing.assert_close(share_TE.gather(1, index_TK), chosen_TK)
    moe.gate.norm_topk_prob = False
    torch.testing.assert_close(moe.gate(sample.input_TD, moe.experts).top_k_weights, chosen_TK)
    torch.testing.assert_close(moe(sample.input_TD), sample.output_TD * chosen_TK.sum(-1, keepdim=True))


def test_slots_without_an_expert_weigh_nothing_and_the_others_sum_to_one():
    sample = random_sample()
    moe = block_for(sample, Plan(0, 2, 4, 48), "softmax", selection="top-p:p=0.5")
    moe.gate.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    index_TK, weights_TK = moe.gate(sample.input_TD, moe.experts)
    assert (index_TK == 4).any()
    assert not weights_TK[index_TK == 4].any()
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(len(weights_TK)))


@pytest.mark.parametrize("active", [1, 2])
def test_the_routers_gradient_is_that_of_its_formula(active):
    moe, sample, _ = upcycled(f"active={active}")
    moe.gate.weight.requires_grad_(True)
    moe.experts.down_proj.data += 0.1 * torch.randn(moe.experts.down_proj.shape)  # equal experts give none
    x_TD = sample.input_TD
    moe.train()
    moe(x_TD).square().sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0
    if active == 1:
        return
    weight = moe.gate.weight.detach().clone().requires_grad_(True)
    top_TK, index_TK = (x_TD @ weight.T).softmax(-1).topk(active)
    every = torch.stack([moe.experts.hidden(x_TD, e) @ moe.experts.down_proj[e].T for e in range(4)], dim=1)
    weights_TK = top_TK / top_TK.sum(-1, keepdim=True)
    picked_TKD = every.gather(1, index_TK[..., None].expand(-1, -1, x_TD.shape[1]))
    (weights_TK[..., None] * picked_TKD).sum(1).square().sum().backward()
    torch.testing.assert_close(moe.gate.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_layers_start_with_rows_of_their_own_and_the_seed_changes_them():
    (one, _, _), (again, _, _), (other, _, _) = upcycled(), upcycled(), upcycled(router="softmax:seed=1")
    assert torch.equal(one.gate.weight, again.gate.weight)
    assert not torch.equal(one.gate.weight, other.gate.weight)
    assert one.gate.weight.abs().max() <= 1 / 16**0.5
    rows = registry.build("router", "softmax").fit(random_sample(seed=5), upcycled()[2], 2)["weight"]
    assert not torch.equal(one.gate.weight, rows)


# conversion


def test_what_is_said_of_an_upcycled_model_is_so(made):
    folder, metrics = made
    assert (metrics.plan, metrics.ffn_active, metrics.memory_factor) == ("S0A2E4", 2.0, 4.0)
    assert metrics.perplexity == pytest.approx(metrics.perplexity_dense, rel=1e-3)
    model, _ = moesaic.load(folder)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert metrics.total_parameters == sum(p.numel() for p in model.parameters())
    assert metrics.active_parameters == metrics.total_parameters - experts // 2
    assert "2.0 x of each feed-forward network runs per token" in (folder / "README.md").read_text()
    assert "recovery: none" in (folder / "moesaic.yaml").read_text()


def test_experts_are_bit_equal_copies(made):
    dense, converted = Checkpoint(tiny_folder()), Converted(made[0])
    for index in range(4):
        layer, prefix = converted.layer(index), f"model.layers.{index}."
        gate, up, down = (dense.read(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        for expert in range(4):
            assert torch.equal(layer["mlp.experts.gate_up_proj"][expert], torch.cat([gate, up]))
            assert torch.equal(layer["mlp.experts.down_proj"][expert], down)
        for name in ("self_attn.q_proj.weight", "input_layernorm.weight"):
            assert torch.equal(layer[name], dense.read(prefix + name))


@torch.no_grad()
def test_stock_mixtral_gives_the_dense_models_logits(made):
    folder, metrics = made
    assert metrics.format == "mixtral"
    assert metrics.format_reason == ""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(stock).__name__ == "MixtralForCausalLM"
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32).eval()
    tokens = torch.arange(100, 140)[None]
    torch.testing.assert_close(stock(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    ours, _ = moesaic.load(folder, dtype=torch.float32)
    torch.testing.assert_close(ours(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def test_every_family_can_be_upcycled(folders, family, tmp_path):
    metrics = moesaic.convert(folders(family), tmp_path / "out", UPCYCLE)
    assert metrics.perplexity == pytest.approx(metrics.perplexity_dense, rel=1e-3)
    stock = {"llama": "mixtral", "llama3-rope": "mixtral", "mistral": "mixtral", "phi3": "mixtral", "tied": "mixtral"}
    assert metrics.format == (stock | {"olmo2": "flex_olmo"}).get(family, "moesaic")
    assert bool(metrics.format_reason) == (metrics.format == "moesaic")
    model, _ = moesaic.load(tmp_path / "out")
    assert {type(block.gate).__name__ for block in moe_blocks(model)} <= {"SoftmaxGate"}


def test_saved_and_loaded_is_bit_equal(tmp_path):
    config = UPCYCLE.model_copy(update={"format": "moesaic", "router": "softmax:renormalised=False"})
    moesaic.convert("tiny", tmp_path / "out", config, force=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.config.norm_topk_prob
    assert not any(block.gate.norm_topk_prob for block in moe_blocks(model))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_an_export_and_back_is_bit_equal(made, tmp_path):
    moesaic.export(made[0], tmp_path / "own", "moesaic")
    moesaic.export(tmp_path / "own", tmp_path / "stock", "mixtral")
    one, other = Checkpoint(made[0]), Checkpoint(tmp_path / "stock")
    assert list(one.names()) == list(other.names())
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())


# bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--partition", "upcycle:experts=2,active=3"], "at most all can run"),
        (["--partition", "upcycle:experts=1"], "option experts of partition 'upcycle' is 1; give a whole number"),
        (["--partition", "upcycle:active=0"], "option active of partition 'upcycle' is 0; give a whole number"),
        (["--partition", "upcycle:experts=100"], "from 2 to 64"),
        (["--partition", "upcycle", "--active", "0.5"], "--active 0.5 has no say"),
        (["--partition", "upcycle", "--plan", "S0A2E4"], "--plan S0A2E4 has no say"),
        (["--partition", "upcycle", "--memory-factor", "2"], "--memory-factor 2.0 has no say"),
        (["--partition", "upcycle", "--fine"], "--fine has no say"),
        (["--partition", "upcycle", "--recovery", "closed-form"], "has nothing to win back"),
        (["--partition", "upcycle", "--router", "linear"], "are whole FFNs; use --router softmax"),
        (["--partition", "coactivation", "--router", "softmax"], "are parts of a sum; use --router linear"),
        (["--partition", "upcycle", "--format", "glm4_moe"], "cannot be written as glm4_moe: its router is linear"),
    ],
)
def test_bad_input_is_one_clear_error(run, tmp_path, arguments, says):
    code, out, err = run("convert", "tiny", tmp_path / "out", *arguments)
    assert code == 2
    assert out == ""
    assert says in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_options_from_python_are_checked_too():
    from moesaic.partition.upcycle import Upcycle

    with pytest.raises(InputError, match="option experts of partition 'upcycle' is 1"):
        ConvertConfig(partition=Upcycle(experts=1))
    assert str(prepare("tiny", ConvertConfig(partition=Upcycle(experts=6, active=3), tokens=512)).plan) == "S0A3E6"
    assert QUICK.recovery is None


# training

SHORT = FinetuneConfig(
    method="moe-llava", objective="lm", window=64, samples=64, batch=4, held_out=8, steps=8, evaluations=4,
    device="cpu", teacher="tiny", learning_rate=1e-3,
)  # fmt: skip


def text(tmp_path):
    """Text of a kind that the model does not know."""
    path = tmp_path.parent / f"{tmp_path.name}-rows.txt"
    path.write_text(
        "".join(f"row {i}: {i * i % 97} of {i % 13} -> {'xyz'[i % 3] * (1 + i % 5)};\n" for i in range(4_000))
    )
    return str(path)


def naive_balance(scores_TE, index_TK):
    """`E sum_i F_i G_i`, expert by expert."""
    probability_TE = scores_TE.exp() / scores_TE.exp().sum(-1, keepdim=True)
    experts = scores_TE.shape[1]
    total = 0.0
    for i in range(experts):
        chosen = sum((row == i).sum().item() for row in index_TK) / index_TK.numel()
        total += chosen * probability_TE[:, i].mean().item()
    return experts * total


def test_the_balance_loss_is_its_formula_and_alpha_when_even():
    moe, sample, _ = upcycled()
    moe.gate.weight.data *= 10
    scores_TE = moe.gate.exact_scores(sample.input_TD, moe.experts)
    index_TK = moe.gate(sample.input_TD, moe.experts).top_k_index
    assert balance_loss(scores_TE, index_TK).item() == pytest.approx(naive_balance(scores_TE, index_TK), rel=1e-5)
    assert balance_loss(scores_TE, index_TK) > 1
    even_TK = torch.stack([torch.arange(40) % 4, (torch.arange(40) + 1) % 4], dim=1)
    even = FinetuneConfig().balance_weight * balance_loss(torch.zeros(40, 4), even_TK).item()
    assert even == pytest.approx(0.01)


def test_moe_llava_learns_and_changes_routers_and_experts_only(made, tmp_path):
    rows = text(tmp_path)
    config = SHORT.model_copy(update={"data": (rows,)})
    result = moesaic.finetune(made[0], tmp_path / "out", config)
    assert result.improved
    assert result.held_out_loss < result.held_out_loss_before
    assert result.trainable_parameters.keys() == {"router", "routed"}
    assert result.format == "mixtral"
    one, other = Checkpoint(made[0]), Checkpoint(tmp_path / "out")
    changed = {name for name in one.names() if not torch.equal(one.read(name), other.read(name))}
    assert changed
    assert all("block_sparse_moe" in name for name in changed)
    assert any(name.endswith("gate.weight") for name in changed)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["layer_loss"] >= 0.0099 for row in logged)  # alpha at least, whatever the load is
    assert "balance: loss" in (tmp_path / "out" / "moesaic.yaml").read_text()
    model, _ = moesaic.load(tmp_path / "out", dtype=torch.float32)
    apart = [block.experts.down_proj[0] - block.experts.down_proj[1] for block in moe_blocks(model)]
    assert all(difference.abs().max() > 0 for difference in apart)


def test_the_balance_loss_can_be_left_out(made, tmp_path):
    config = SHORT.model_copy(update={"balance": "none", "data": (text(tmp_path),), "steps": 2})
    moesaic.finetune(made[0], tmp_path / "out", config)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["layer_loss"] == 0 for row in logged)


def test_moe_llava_of_a_model_that_was_cut_keeps_its_router(tmp_path):
    moesaic.convert("tiny", tmp_path / "cut", QUICK.model_copy(update={"plan": "S1A1E4"}))
    config = SHORT.model_copy(update={"data": (text(tmp_path),)})
    result = moesaic.finetune(tmp_path / "cut", tmp_path / "out", config)
    assert result.improved
    assert result.trainable_parameters.keys() == {"router", "shared", "routed"}
    assert Converted(tmp_path / "out").config.router == "linear"


@pytest.mark.parametrize("method", ["lora", "full", "router"])
def test_other_methods_train_an_upcycled_model_too(made, tmp_path, method):
    result = moesaic.finetune(made[0], tmp_path / "out", SHORT.model_copy(update={"method": method, "steps": 2}))
    assert result.steps == 2


@pytest.mark.parametrize("method", ["dsmoe", "d2dmoe", "rmoe", "factorllm"])
def test_methods_for_parts_of_an_ffn_refuse_whole_ones(made, tmp_path, method):
    config = SHORT.model_copy(update={"method": method, "balance": None, "learning_rate": None})
    with pytest.raises(InputError, match="experts are whole FFNs that router 'softmax' averages"):
        moesaic.finetune(made[0], tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_balance_is_refused_where_the_number_of_experts_varies(tmp_path):
    config = UPCYCLE.model_copy(update={"selection": "top-p:p=0.5"})
    metrics = moesaic.convert("tiny", tmp_path / "out", config)
    assert metrics.perplexity == pytest.approx(metrics.perplexity_dense, rel=1e-3)
    with pytest.raises(InputError, match="give --balance none"):
        moesaic.finetune(tmp_path / "out", tmp_path / "tuned", SHORT)


def test_the_number_of_experts_can_vary_in_an_upcycled_model(made, tmp_path):
    config = moesaic.AdaptConfig(method="threshold", target_active=0.75, tokens=1_024, window=64)
    result = moesaic.adapt(made[0], tmp_path / "adapter", config)
    assert 1 < result.experts_per_token < 2
    model, _ = moesaic.load(made[0], adapter=tmp_path / "adapter")
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
