"""A router ahead of the model: its mathematics, its caches, its partitions, its training."""

import copy
import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, StaticCache

import moesaic
from conftest import QUICK, SMALL, random_sample, small_model
from moesaic import ConvertConfig, FinetuneConfig, InputError, Plan, export, registry
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.conversion.convert import convert
from moesaic.models.families import gated_ffn
from moesaic.models.moe_block import Routing, find_blocks, routed_by
from moesaic.moe.ahead import drop_network, network_of
from moesaic.moe.modeling import moe_blocks, moesaic_config
from moesaic.partition.domains import common, mean_magnitude
from moesaic.partition.paths import captured, projected
from moesaic.routing._distil import distillation_loss, graded, graded_target, overlap, teach
from moesaic.routing._network import causal
from moesaic.routing.pregate import group_of, network_from
from moesaic.training.expert_load import selection_loss
from moesaic.training.locality import kept_experts, locality_loss
from moesaic.training.methods.read_me import targets

LAYERS = 4
SHAPE = Plan(1, 1, 4, 24)
DENSE = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=256, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    initializer_range=0.2,
)  # fmt: skip
AHEAD = QUICK.model_copy(update={"partition": "paths", "plan": "S1A1E4", "router": "pregate:steps=6,batch=4"})


def routed_ahead(groups=2, plan=SHAPE, **fields):
    torch.manual_seed(0)
    config = moesaic_config(DENSE, plan, "pregate", router_hidden_size=32, pregate_groups=groups, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.pregate.embed)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return routed_ahead()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("ahead") / "out"
    return out, convert(folders("llama"), out, AHEAD)


def greedy(model, tokens, **options):
    options = {"attention_mask": torch.ones_like(tokens)} | options
    return model.generate(tokens, max_new_tokens=10, do_sample=False, **options)


# decisions


def test_one_decision_for_each_group_of_consecutive_layers():
    assert [group_of(layer, 5, 2) for layer in range(5)] == [0, 0, 0, 1, 1]
    assert [group_of(layer, 4, 4) for layer in range(4)] == [0, 1, 2, 3]
    model, seen = routed_ahead(groups=2), []
    for block in find_blocks(model):
        block.watch(lambda x, routing: seen.append(routing.top_k_index))
    model(torch.arange(2, 42)[None])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])


def test_with_all_experts_on_the_model_is_the_dense_one(tokens):
    dense = small_model("llama")
    plan = Plan(0, 4, 4, 24)
    config = moesaic_config(dense.config, plan, "pregate", router_hidden_size=32, pregate_groups=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).view(4, 24)
    for layer, block in zip(dense.model.layers, moe_blocks(model), strict=True):
        block.load_dense(gated_ffn(layer.mlp), torch.zeros(0, dtype=torch.int64), order, {})
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)


def test_decisions_by_hand_equal_the_networks_and_the_blocks_fed_with_them(model, tokens):
    expected = model(tokens, use_cache=False).logits
    decided = model.pregate.route(tokens)
    assert decided.shape == (3, 12, 2, 1)
    with model.pregate.decisions(decided.flatten(0, 1)):
        assert torch.equal(model(tokens, use_cache=False).logits, expected)
    other = torch.randint(3, (36, 2, 1), generator=torch.Generator().manual_seed(2))
    with model.pregate.decisions(other):
        by_hand = model(tokens, use_cache=False).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), use_cache=False).logits
    fed = [Routing(other[:, group_of(layer, LAYERS, 2)], torch.ones(36, 1)) for layer in range(LAYERS)]
    with routed_by(find_blocks(model), fed):
        assert torch.equal(model(tokens, use_cache=False).logits, by_hand)
    assert torch.equal(embedded, by_hand)
    assert not torch.allclose(by_hand, expected)
    assert torch.equal(model(tokens, use_cache=False).logits, expected)  # nothing is left of them


def test_a_request_routed_piece_by_piece_equals_one_pass(model, tokens):
    whole = model.pregate.route(tokens)
    pieces = []
    for first, last in ((0, 5), (5, 6), (6, 11), (11, 12)):
        for request in range(3):  # interleaved, each with a state of its own
            pieces.append((request, model.pregate.route_tokens(request, tokens[request, first:last].tolist())))
    for request in range(3):
        found = torch.cat([part for owner, part in pieces if owner == request])
        assert found.dtype == torch.int64
        assert torch.equal(found, whole[request])
    model.pregate.forget(0)
    assert set(model.pregate.requests) == {1, 2}
    assert torch.equal(model.pregate.route_tokens(0, tokens[0]), whole[0])
    for request in range(3):
        model.pregate.forget(request)
    model.pregate.forget("unknown")


def test_selections_of_a_varying_number_work_and_pad_with_no_expert(tokens):
    model = routed_ahead(selection="threshold:threshold=0.5")
    decided = model.pregate.route(tokens)
    counts = (decided < 3).sum(-1)
    assert counts.min() < counts.max() == decided.shape[-1]
    with model.pregate.decisions(decided.flatten(0, 1)):
        by_hand = model(tokens).logits
    torch.testing.assert_close(by_hand, model(tokens).logits)


# caches


def test_a_cache_equals_none(model, tokens):
    full = model(tokens, use_cache=False).logits
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=20),
    ):
        parts = [model(tokens[:, :5], past_key_values=cache).logits]
        parts += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(5, 9)]
        parts += [model(tokens[:, 9:], past_key_values=cache).logits]
        torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_a_cache_equals_generation_without(model, tokens, options):
    without = greedy(model, tokens, **{k: v for k, v in options.items() if k == "num_beams"}, use_cache=False)
    assert torch.equal(greedy(model, tokens, **options), without)


def test_what_crops_the_cache_crops_the_routers_part(model, tokens):
    row = tokens[:1].repeat(1, 3)
    assert torch.equal(greedy(model, row, prompt_lookup_num_tokens=3), greedy(model, row))


def test_a_left_padded_batch_equals_each_alone(model, tokens):
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5] = 0
    padded = tokens.masked_fill(mask == 0, 1)
    together = greedy(model, padded, attention_mask=mask)
    for row in range(3):
        start = 12 - int(mask[row].sum())
        alone = greedy(model, padded[row : row + 1, start:])[0, 12 - start :]
        found = together[row, 12:]
        assert found[: len(alone)].tolist() == alone.tolist()
        assert (found[len(alone) :] == 1).all()


def test_sampling_runs_in_a_batch_with_several_returns(model, tokens):
    found = model.generate(tokens, max_new_tokens=4, do_sample=True, num_return_sequences=2, pad_token_id=1)
    assert found.shape == (6, 16)


def test_texts_packed_in_one_row_do_not_see_each_other(model, tokens):
    packed = torch.cat([tokens[0, :7], tokens[1, :5]])[None]
    place = torch.cat([torch.arange(7), torch.arange(5)])[None]
    found = model(packed, position_ids=place, use_cache=False).logits[0]
    torch.testing.assert_close(found[7:], model(tokens[1:2, :5]).logits[0], rtol=1e-4, atol=1e-5)


def test_masks_let_each_place_see_those_before():
    assert causal(2, 4, torch.device("cpu"))[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]


# files


def test_saved_and_loaded_to_the_same_bits(model, tokens, tmp_path):
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, expected)
    assert json.loads((tmp_path / "config.json").read_text())["pregate_groups"] == 2
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(half.pregate.route(tokens), copy.deepcopy(half).float().pregate.route(tokens))


def test_a_copy_has_a_router_of_its_own(model, tokens):
    expected = model(tokens).logits
    other = copy.deepcopy(model)
    other.pregate.head.zero_()
    other(tokens)
    assert torch.equal(model(tokens).logits, expected)
    assert moe_blocks(other)[0].gate.ahead[0] is other.pregate
    drop_network(other)
    assert network_of(other) is None


# conversion


def test_more_groups_than_an_export_checks_layers(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"num_hidden_layers": 6})).save_pretrained(
        tmp_path / "dense"
    )
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(tmp_path / "dense")
    config = ConvertConfig(plan="S1A1E4", partition="paths", router="pregate:groups=0,steps=5", tokens=2_048, window=64,
                           held_out_tokens=256, device="cpu")  # fmt: skip
    convert(tmp_path / "dense", tmp_path / "out", config, force=True)
    export(tmp_path / "out", tmp_path / "again", "moesaic")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pregate_groups"] == 6


def test_conversion_makes_a_model_that_loads_and_measures_as_it_says(made):
    out, result = made
    model, tokenizer = moesaic.load(out)
    assert result.format == "moesaic"
    assert result.router.groups == 1
    assert "its router is linear, the model's is pregate" in result.format_reason
    found = moesaic.evaluate(model, tokenizer, window=64, max_tokens=256).perplexity
    assert found == pytest.approx(result.perplexity, rel=0.05)
    assert moesaic.complete(model, tokenizer, "The first", max_new_tokens=4)
    assert sum(p.numel() for p in model.parameters()) == result.total_parameters
    assert result.router.parameters == sum(p.numel() for p in model.pregate.parameters())
    tables = [name for name in Checkpoint(out).names() if "pregate" in name]
    assert len(tables) == 11
    assert not list(out.glob("hidden*"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("layer", [0, 2])
def test_a_killed_conversion_resumes_to_the_same_bits(folders, made, tmp_path, layer):
    def kill(done, count, note):
        if done == layer and "layer error" in note * bool(layer) + "layer error" * (not layer):
            raise Killed

    with pytest.raises(Killed):
        convert(folders("llama"), tmp_path / "out", AHEAD, progress=kill)
    notes = []
    convert(folders("llama"), tmp_path / "out", AHEAD, progress=lambda done, count, note: notes.append(note))
    assert any("teaching" in note for note in notes) == (layer == 0)
    first, again = Checkpoint(made[0]), Checkpoint(tmp_path / "out")
    assert all(torch.equal(first.read(name), again.read(name)) for name in first.names())


@pytest.mark.parametrize(
    ("partition", "router", "plan"),
    [
        ("coactivation", "pregate:groups=0,steps=4", "S2A2E8"),
        ("paths", "pregate:groups=3,importance=True,steps=4", "S0A2E4"),
        ("domains", "pregate:steps=4,signed=True", "S1A1E4"),
        ("paths:by_domain=True", "linear", "S1A1E4"),
    ],
)
def test_routers_and_partitions_go_together(folders, tmp_path, partition, router, plan):
    config = QUICK.model_copy(update={"partition": partition, "router": router, "plan": plan})
    result = convert(folders("qwen2"), tmp_path / "out", config)
    assert (result.router is None) == (router == "linear")
    assert all(record.error < record.split_error for record in result.layers)
    model, _ = moesaic.load(tmp_path / "out")
    assert model(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"router": "pregate:groups=9"}, "groups=9, the model 3 layers"),
        ({"router": "pregate:heads=64"}, "64 heads need a width of at least 128"),
        ({"format": "glm4_moe"}, "its router is linear, the model's is pregate"),
        ({"partition": "auto", "plan": None}, "name the partition"),
        (
            {"partition": "domains:copied=True", "plan": None, "active": 0.5, "memory_factor": 1.0},
            "domain of text for each expert: 2, found 1",
        ),
        ({"partition": "domains:copied=True", "plan": None, "active": 0.9}, "give --memory-factor 1.8"),
    ],
)
def test_what_cannot_work_says_so(folders, tmp_path, changes, says):
    if changes.get("active") == 0.5:
        (tmp_path / "one.txt").write_text("One domain is too few. " * 2_000)
        changes = changes | {"calibration": (str(tmp_path / "one.txt"),)}
    with pytest.raises(InputError, match=says):
        convert(folders("llama"), tmp_path / "out", AHEAD.model_copy(update=changes))


def test_calls_that_cannot_be_routed_say_so(model, tokens, made, tmp_path):
    with pytest.raises(InputError, match="call it with input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(tokens))
    with pytest.raises(InputError, match="has not seen these tokens"):
        moe_blocks(model)[0](torch.randn(2, 32))
    with pytest.raises(InputError, match=r"\[tokens, 2 groups"), model.pregate.decisions(torch.zeros(3, 1, 1)):
        pass
    with (
        pytest.raises(InputError, match="beyond the 3"),
        model.pregate.decisions(torch.full((3, 2, 1), 4)),
    ):
        pass
    with pytest.raises(InputError, match=r"expected torch[.]int64"), model.pregate.decisions(torch.zeros(3, 2, 1)):
        pass
    for ids in ([], [-1], [5, 10**6]):
        with pytest.raises(InputError, match="not all from 0 to"):
            model.pregate.route_tokens("a", ids)
    assert not model.pregate.requests
    few = torch.zeros(3, 2, 1, dtype=torch.int64)
    with pytest.raises(InputError, match="for 3 tokens, the model got 36"), model.pregate.decisions(few):
        model(tokens)
    cache = DynamicCache(config=model.config)
    with model.pregate.decisions(torch.zeros(36, 2, 1, dtype=torch.int64)):
        model(tokens, past_key_values=cache)
    with pytest.raises(InputError, match="of which the router ahead has seen 0"):
        model(tokens[:, :1], past_key_values=cache)
    with pytest.raises(InputError, match=r"route_tokens"):
        model.model(tokens[:1], cache=object())
    with pytest.raises(InputError, match="attention_mask is"):
        model(tokens, attention_mask=torch.ones(3, 4))
    for name in ("gguf", "glm4_moe", "auto"):
        with pytest.raises(InputError, match="its router is linear, the model's is pregate"):
            moesaic.export(made[0], tmp_path / ("x.gguf" if name == "gguf" else "x"), name)


# what the layers teach


def test_grades_are_read_mes_by_hand():
    value = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2]])
    expected = torch.tensor([[5.0, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]]) / 30  # n = 10: thresholds at ranks 2, 4, 6, 8, 10
    torch.testing.assert_close(graded(value, 10), expected)
    experts = torch.tensor([[0, 1, 10], [2, 4, 6]])
    torch.testing.assert_close(overlap(value, experts, 10), torch.tensor([[10.0, 9.0]]) / 30)


def test_the_target_is_the_loss_of_read_mes_code():
    g = torch.Generator().manual_seed(0)
    overlaps = [torch.rand(20, 4, generator=g) for _ in range(3)]
    logits = torch.randn(20, 4, generator=g)
    by_layer = logits.new_zeros(())
    for found in overlaps:
        dist = 10 * (found - found.mean())
        by_layer += 0.75 * cross_entropy(logits, dist.argmax(1), label_smoothing=0.5, reduction="sum")
        by_layer += 0.25 * cross_entropy(logits, dist.softmax(1), reduction="sum")
    mean = torch.stack([graded_target(found, 1) for found in overlaps]).mean(0)
    torch.testing.assert_close(3 * distillation_loss(logits, mean), by_layer)
    torch.testing.assert_close(graded_target(overlaps[0], 2).sum(1), torch.ones(20))


def test_a_router_learns_what_token_ids_say_and_leaves_other_rows_alone():
    config = moesaic_config(DENSE, Plan(0, 1, 4, 24), "pregate", router_hidden_size=32, pregate_groups=1)
    embedding = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    network = network_from(config, embedding, 0)
    assert torch.equal(network.embed, embedding)
    tokens = torch.randint(40, (32, 16), generator=torch.Generator().manual_seed(1))
    target = torch.nn.functional.one_hot(tokens % 4, 4).float()[:, :, None]
    lesson = teach(network, tokens, target, 0, steps=120, learning_rate=1e-2, batch=8)
    assert lesson.agreement > 0.9
    assert lesson.least == pytest.approx(0, abs=1e-6)
    assert torch.equal(network.embed[40:], embedding[40:])
    assert (network.route(tokens)[..., 0, 0] == tokens % 4).float().mean() > 0.9


def test_read_mes_teacher_sees_the_dense_stream_through_the_experts(tokens):
    dense = small_model("llama").requires_grad_(False)
    config = moesaic_config(dense.config, Plan(0, 1, 4, 24), "pregate", router_hidden_size=32, pregate_groups=3)
    model = AutoModelForCausalLM.from_config(config).eval()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).view(4, 24)
    inputs = []
    for layer, block in zip(dense.model.layers, moe_blocks(model), strict=True):
        block.load_dense(gated_ffn(layer.mlp), torch.zeros(0, dtype=torch.int64), order, {})
        layer.mlp.register_forward_pre_hook(lambda mlp, args: inputs.append(args[0].flatten(0, 1)))
    found = targets(model, tokens, dense, 3, importance=False)
    for layer in range(3):
        ffn = gated_ffn(dense.model.layers[layer].mlp)
        value = ffn.hidden(inputs[layer]).abs() * ffn.down_DF.norm(dim=0)
        torch.testing.assert_close(found[:, layer], graded_target(overlap(value, order, 24), 1), rtol=1e-4, atol=1e-5)


# partitions


def test_domains_take_the_most_active_neurons_and_share_what_all_want():
    sample = random_sample(tokens=400)
    h = sample.ffn.hidden(sample.input_TD).abs()
    mean = torch.stack([h[sample.domain_T == d].mean(0) for d in range(4)])
    torch.testing.assert_close(mean_magnitude(sample, sample.domain_T, 4), mean)
    best = [set(mean[d].topk(24).indices.tolist()) for d in range(4)]
    every = set.intersection(*best)
    shared = registry.build("partition", "domains").split(sample, Plan(1, 1, 5, 12), torch.Generator())
    assert len(every) >= 12, "the sample is to have that much in common"
    assert set(shared.shared.tolist()) <= every
    copied = registry.build("partition", "domains").split(sample, Plan(0, 1, 4, 24), torch.Generator())
    for domain in range(4):  # stored once or copied, a domain runs the same neurons: its best
        own = set(shared.shared.tolist()) | set(shared.experts[domain].tolist())
        assert own == best[domain] == set(copied.experts[domain].tolist())
    assert Plan(1, 1, 5, 12).memory_factor(48) < Plan(0, 1, 4, 24).memory_factor(48)
    assert common(mean, 0, 24).tolist() == []


def test_copied_domains_are_as_many_as_memory_holds():
    method = registry.build("partition", "domains:copied=True")
    plan = method.shape(0.5, 3.5, 96)
    assert (plan.shared, plan.num_experts_per_tok, plan.num_experts, plan.width) == (0, 1, 7, 48)
    assert registry.build("partition", "domains").shape(0.5, 3.5, 96) is None


def test_paths_put_neurons_where_the_tokens_are_that_need_them():
    sample = random_sample(tokens=300, neurons=48)
    chosen = (torch.arange(300) % 3)[:, None]
    value = (sample.ffn.hidden(sample.input_TD) * sample.weight_T[:, None] * sample.ffn.down_DF.norm(dim=0)).square()
    found = captured(sample, chosen, 3)
    for expert in range(3):
        torch.testing.assert_close(found[:, expert], value[chosen[:, 0] == expert].sum(0) / 300)
    torch.testing.assert_close(found[:, 3], value.mean(0))
    sample = type(sample)(**{**vars(sample), "chosen_TK": chosen})
    partition = registry.build("partition", "paths").split(sample, Plan(1, 1, 4, 12), torch.Generator())
    assert partition.is_disjoint(48)

    def caught(experts, shared):
        return sum(found[own, e].sum() for e, own in enumerate(experts)) + found[shared, 3].sum()

    best = caught(partition.experts, partition.shared)
    for seed in range(20):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(seed)).view(4, 12)
        assert caught(order[:3], order[3]) <= best


def test_projections_keep_angles():
    sample = random_sample(tokens=50, neurons=48)
    value = torch.nn.functional.normalize(
        sample.ffn.hidden(sample.input_TD).abs() * sample.ffn.down_DF.norm(dim=0), dim=1
    )
    found = projected(sample, 4_096, torch.Generator().manual_seed(0))
    assert (found @ found.T - value @ value.T).abs().max() < 0.1


# training

SHORT = FinetuneConfig(window=24, samples=32, batch=2, held_out=4, steps=12, evaluations=3, device="cpu")


def test_locality_by_hand():
    scores = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 0]])
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0]])
    log_share = scores.log_softmax(-1)
    expected = torch.log(torch.tensor(0.5)) - log_share[1, [0, 1]].mean()
    expected = expected + torch.log(torch.tensor(0.5)) - log_share[3, [2, 0]].mean()
    torch.testing.assert_close(locality_loss(scores, index, 2), expected)
    assert locality_loss(scores, index, 1) == 0
    none = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]])  # 3 is no expert
    torch.testing.assert_close(locality_loss(scores, none, 2), -log_share[1, 0] - log_share[3, 2])
    assert kept_experts(torch.tensor([[0, 1], [1, 0], [0, 2], [0, 2]]), 4) == pytest.approx(2 / 3)
    assert kept_experts(torch.tensor([[0, 1], [1, 0], [0, 2], [0, 2]]), 2) == 1


def test_locality_is_a_price_for_the_best_state():
    load = moesaic.results.ExpertLoad(
        coefficient_of_variation=0, dead_experts=0, experts_per_token=1, kept_experts=0.75
    )
    assert selection_loss(3.0, load, 0.2) == pytest.approx(3.05)
    assert selection_loss(3.0, load, 0.0) == 3.0


def test_rounds_alternate_and_rates_fall():
    method = registry.build("method", "read-me:rounds=2")
    alone = [method.router_alone(step / 12) for step in range(12)]
    assert alone == ([True] * 2 + [False] * 4) * 2
    assert method.rate(0.55, 0.0) == pytest.approx(0.8 * method.rate(0.05, 0.0))


def test_read_me_trains_both_in_turn_and_resumes_to_the_same_bits(folders, made, tmp_path, monkeypatch):
    config = SHORT.model_copy(update={"method": "read-me:rounds=2", "teacher": str(folders("llama"))})
    config = config.model_copy(update={"learning_rate": 5e-3, "objective": "lm"})
    facts = moesaic.finetune(made[0], tmp_path / "whole", config)
    assert facts.improved
    assert facts.trainable_parameters["router"] == made[1].router.parameters
    before, after = Checkpoint(made[0]), Checkpoint(tmp_path / "whole")
    changed = {name for name in before.names() if not torch.equal(before.read(name), after.read(name))}
    assert any("pregate" in name for name in changed)
    assert any("experts" in name for name in changed)

    def stop(done, count, note):
        if done >= 60:
            raise Killed

    with pytest.raises(Killed):
        moesaic.finetune(made[0], tmp_path / "parts", config, progress=stop)
    again = moesaic.finetune(made[0], tmp_path / "parts", config)
    assert again.held_out_loss == facts.held_out_loss
    parts = Checkpoint(tmp_path / "parts")
    assert all(torch.equal(parts.read(name), after.read(name)) for name in after.names())


def test_locality_makes_neighbours_alike(folders, made, tmp_path):
    config = SHORT.model_copy(
        update={"method": "router", "locality": 20.0, "router_learning_rate": 3e-3, "teacher": str(folders("llama"))}
    )
    facts = moesaic.finetune(made[0], tmp_path / "out", config)
    assert facts.improved
    assert facts.load.after.kept_experts > facts.load.before.kept_experts


def test_what_training_cannot_do_says_so(folders, made, tmp_path):
    oracle = tmp_path / "oracle"
    convert(folders("llama"), oracle, QUICK.model_copy(update={"router": "oracle", "recovery": "none"}))
    config = SHORT.model_copy(update={"method": "read-me", "teacher": str(folders("llama"))})
    with pytest.raises(InputError, match="convert with --partition paths --router pregate"):
        moesaic.finetune(oracle, tmp_path / "out", config)
    with pytest.raises(InputError, match="--locality 1 is for routers"):
        moesaic.finetune(oracle, tmp_path / "out", config.model_copy(update={"method": "full", "locality": 1.0}))
    with pytest.raises(InputError, match="--balance bias"):
        moesaic.finetune(made[0], tmp_path / "out", config.model_copy(update={"balance": "bias"}))
    with pytest.raises(InputError, match="only routers that score each expert"):
        moesaic.prune(str(made[0]), tmp_path / "out", moesaic.PruneConfig(experts=2))


def test_methods_that_give_each_layer_a_router_drop_the_one_ahead(tokens, tmp_path):
    model = routed_ahead()
    registry.build("method", "d2dmoe:width=8").prepare(model)
    assert network_of(model) is None
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, expected)


def test_settings_are_read_from_short_names():
    assert FinetuneConfig.read(None, {"method": "read-me", "rounds": 3}).method == "read-me:rounds=3"
    assert ConvertConfig(router="pregate:groups=4").router == "pregate:groups=4"
