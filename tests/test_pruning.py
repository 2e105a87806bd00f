"""Experts left out of models that are Mixtures of Experts: mathematics first, then whole models, then bad input."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from torch.nn import functional
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moesaic
from conftest import SMALL
from moesaic import InputError, PruneConfig, find_blocks, registry
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.writer import ResumableOutput
from moesaic.pruning.methods.base import best
from moesaic.pruning.methods.merge import alignment, matrices, neurons, owners
from moesaic.pruning.methods.naee import exchange, remove, set_error
from moesaic.pruning.methods.reap import saliency
from moesaic.pruning.recover import recover
from moesaic.pruning.sample import BlockSample, cut
from test_moe_block import CHOSEN, EXPERTS, STOCK, stock

FAMILIES = [name for name in STOCK if name != "llama4"]
LIKE_CONVERT = {"tokens": 512, "window": 64, "held_out_tokens": 128, "collapse_ratio": 1e9}


def whole(name, **more):
    """A tiny stock model with room for the bundled tokenizer's tokens, its parameters all random."""
    config_class, fields, *_ = STOCK[name]
    sizes = {name: SMALL[name] for name in SMALL if name != "intermediate_size"}
    torch.manual_seed(0)
    config = config_class(**sizes | {"num_hidden_layers": 2} | fields | {"num_experts_per_tok": CHOSEN} | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))]:
        parameter.data = torch.randn_like(parameter) * 0.1
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name, **more):
        key = (name, *more.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            whole(name, **more).save_pretrained(made[key])
            AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(made[key])
            (made[key] / "LICENSE").write_text("terms")
        return made[key]

    return get


def config(method="frequency", recovery="none", **more):
    wish = {} if "ratio" in more else {"experts": 4}
    return PruneConfig(**LIKE_CONVERT | wish | {"method": method, "recovery": recovery} | more)


def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager") if model._can_set_experts_implementation() else None
    return model


def masking(monkeypatch, weights, kept):
    """Put -1e9 in place of the removed experts' logits wherever a router's matrix is multiplied with."""
    plain = functional.linear

    def masked(x, weight, bias=None):
        logits = plain(x, weight, bias)
        for router, keep in zip(weights, kept, strict=True):
            if weight.shape == router.shape and torch.equal(weight, router.to(weight.dtype)):
                out = torch.ones(logits.shape[-1], dtype=torch.bool)
                out[keep] = False
                return logits.masked_fill(out, -1e9)
        return logits

    monkeypatch.setattr(functional, "linear", masked)


def sample_of(name="qwen3-moe", tokens=60, **more):
    block = find_blocks(stock(name))[-1]
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))
    return BlockSample(block, x, dict.fromkeys(dict(block.router.state_dict()), 0), **more)


@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_equals_masking_the_router(name, folders, tmp_path, monkeypatch):
    result = moesaic.prune(folders(name), tmp_path / "out", config())
    layers = [layer for layer in result.layers if layer.kept]
    assert all(len(layer.kept) == 4 for layer in layers)
    tokens = torch.randint(1024, (1, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = loaded(tmp_path / "out")(tokens).logits
        source = loaded(folders(name))
        weights = [block.router.weight for block in find_blocks(source)]
        masking(monkeypatch, weights, [layer.kept for layer in layers])
        expected = source(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_keeps_every_bit_and_name(name, folders, tmp_path):
    moesaic.prune(folders(name), tmp_path / "out", config(experts=EXPERTS, recovery="closed-form"))
    before, after = Checkpoint(folders(name)), Checkpoint(tmp_path / "out")
    assert sorted(before.names()) == sorted(after.names())
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    assert before.config == after.config


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_the_sources_layout_with_fewer_experts(name, folders, tmp_path):
    source, out = folders(name), tmp_path / "out"
    result = moesaic.prune(source, out, config("reap"))
    before, after = Checkpoint(source), Checkpoint(out)
    changed = {key for key in before.config if before.config[key] != after.config.get(key)}
    assert before.config.keys() == after.config.keys()
    assert changed <= {"num_experts", "num_local_experts", "n_routed_experts"}
    assert len(changed) == 1
    assert set(after.names()) <= set(before.names())
    assert all(
        (out / file).is_file() for file in ("tokenizer.json", "LICENSE", "moesaic.yaml", "pruning.json", "README.md")
    )
    kept = [layer.kept for layer in result.layers]
    for key in after.names():
        tensor, old = after.read(key), before.read(key)
        if ".experts." in key and tensor.ndim < 3 and "bias" not in key:  # an expert's own
            head, _, tail = key.partition(".experts.")
            number, _, rest = tail.partition(".")
            layer = int(key.split("layers.")[1].split(".")[0])
            old = before.read(f"{head}.experts.{kept[layer][int(number)]}.{rest}")
        elif tensor.shape != old.shape:
            layer = int(key.split("layers.")[1].split(".")[0])
            old = old[kept[layer]]
        assert torch.equal(tensor, old), key
    assert result.max_abs_logit_error < 1e-3
    assert loaded(out).config.num_hidden_layers == 2


def test_renormalised_weights_add_up_to_what_they_did():
    for name, renormalised in (("qwen3-moe", True), ("olmoe", False), ("granite-moe", True)):
        sample = sample_of(name)
        kept = torch.tensor([0, 2, 5])
        few, logits = sample.weights(kept), linear(sample.input_TD, sample.block.router.weight)
        assert not few[:, [1, 3, 4]].any()
        chosen = logits[:, kept].softmax(-1).topk(CHOSEN)
        expected = chosen.values / chosen.values.sum(-1, keepdim=True) if renormalised else chosen.values
        torch.testing.assert_close(few.gather(1, kept[chosen.indices]), expected)


@pytest.mark.parametrize("name", ["qwen3-moe", "olmoe", "deepseek-v3", "phi-moe", "gpt-oss"])
def test_a_sets_error_is_the_blocks(name):
    """The sum over tokens of the squared distance of the block with a masked router, without Gram matrices."""
    sample, kept = sample_of(name), torch.tensor([1, 2, 4])
    with torch.no_grad():
        block, x = sample.block, sample.input_TD

        def output(routing):
            with block.routed_by(routing):
                found = block.module(x[None])
            return found[0] if isinstance(found, tuple) else found

        expected = (output(block.route(x)) - output(sample.masked(kept))).square().sum()
        assert set_error(sample)(kept.tolist()) == pytest.approx(expected.item(), rel=1e-3)


def test_naee_tries_every_set_where_they_are_few():
    sample = sample_of()
    with torch.no_grad():
        error = set_error(sample)
        found = registry.build("pruning", "naee").select(sample, 3, torch.Generator())
        least = min(itertools.combinations(range(EXPERTS), 3), key=error)
    assert found.experts.tolist() == list(least)


def test_removing_one_by_one_is_near_the_best_set_and_exchanges_never_harm():
    ratios = []
    for keep in (2, 3, 4):
        with torch.no_grad():
            error = set_error(sample_of())
            sets = sorted(error(kept) for kept in itertools.combinations(range(EXPERTS), keep))
            greedy = remove(error, range(EXPERTS), keep)
            better = exchange(error, greedy, range(EXPERTS), 5)
        assert error(better) <= error(greedy)
        ratios.append(error(greedy) / sets[0])
    assert max(ratios) < 1.5
    few = registry.build("pruning", "naee:sets=0").select(sample_of(), 3, torch.Generator()).experts
    assert len(few) == 3


@torch.no_grad()
def test_reap_is_the_mean_gated_norm():
    sample = sample_of("olmoe")  # whose gates do not add up to 1
    index, weights = sample.block.route(sample.input_TD)
    total, count = [0.0] * EXPERTS, [0] * EXPERTS
    for t in range(len(index)):
        for slot in range(CHOSEN):
            e = int(index[t, slot])
            gate_up, down = sample.block.experts.gate_up_proj[e], sample.block.experts.down_proj[e]
            gate, up = (gate_up @ sample.input_TD[t]).chunk(2)
            output = down @ (functional.silu(gate) * up)
            total[e] += float(weights[t, slot] / weights[t].sum() * output.norm())
            count[e] += 1
    expected = torch.tensor([s / max(n, 1) for s, n in zip(total, count, strict=True)])
    torch.testing.assert_close(saliency(sample), expected, rtol=1e-4, atol=1e-6)


def test_reap_of_a_hand_computed_example():
    class Ready:
        num_experts = 3
        said = torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.0, 0.0]])  # norms 5, 10, 1

        def weights(self):
            return torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.0, 0.2]])

        def output(self, expert, token):
            return self.said[expert].expand(len(token), -1)

    assert saliency(Ready()).tolist() == pytest.approx([(0.5 * 5 + 0.5 * 5) / 2, 0.5 * 10, 0.5 * 1])


def test_the_best_are_balanced_over_groups():
    score = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert best(score, 4).tolist() == [0, 1, 2, 5]
    assert best(score, 4, 2).tolist() == [0, 1, 4, 5]
    assert best(torch.zeros(6), 2).tolist() == [0, 1]


def test_a_cut_router_is_the_masked_one():
    for name in FAMILIES:
        sample, kept = sample_of(name), torch.tensor([0, 3, 4])
        few = cut(sample.block.router, kept, sample.axes)
        index, _ = replace(sample.block, router=few).route(sample.input_TD)
        assert int(index.max()) < 3
        assert sample.block.router.num_experts == EXPERTS


def test_neurons_are_put_back_into_order():
    gate_up, down = torch.randn(48, 32), torch.randn(32, 24)
    own = neurons(gate_up, down)
    order = torch.randperm(24)
    torch.testing.assert_close(own[order][alignment(own, own[order])], own)
    assert all(torch.equal(a, b) for a, b in zip(matrices(own), (gate_up, down), strict=True))


def test_owners_are_the_most_alike_and_kept_ones_their_own():
    logits = torch.randn(50, 4)
    logits[:, 3] = logits[:, 0] + 0.01 * torch.randn(50)
    assert owners(logits, torch.tensor([0, 2]))[[0, 2, 3]].tolist() == [0, 2, 0]
    logits = torch.randn(50, 8)
    logits[:, 6] = logits[:, 0]
    assert owners(logits, torch.tensor([0, 4]), groups=2).tolist() == [0] * 4 + [4] * 4


@torch.no_grad()
def test_merging_identical_experts_changes_nothing():
    """All experts one expert with its neurons shuffled: merged by any weights they are that expert."""
    sample = sample_of()
    experts = sample.block.experts
    gate, up = experts.gate_up_proj[0].clone().chunk(2)
    down = experts.down_proj[0].clone()
    for e in range(EXPERTS):
        order = torch.randperm(down.shape[1])
        experts.gate_up_proj[e] = torch.cat([gate[order], up[order]])
        experts.down_proj[e] = down[:, order]
    found = registry.build("pruning", "merge").select(sample, 2, torch.Generator())
    for name, value in found.changed.items():
        torch.testing.assert_close(value, experts.get_parameter(name)[found.experts])
    one = registry.build("pruning", "merge:align=False").select(sample, 2, torch.Generator())
    assert not torch.allclose(one.changed["down_proj"], experts.down_proj[one.experts])


def kept_block(sample, kept):
    """The sample's block with fewer experts."""
    block = find_blocks(whole("qwen3-moe", hidden_size=32, num_experts=len(kept)))[0]
    block.experts.load_state_dict({n: p[kept] for n, p in sample.block.experts.state_dict().items()})
    block.router.load_state_dict({n: p[kept] for n, p in sample.block.router.state_dict().items()})
    return block


@torch.no_grad()
@pytest.mark.parametrize(("top_k", "sweeps"), [(1, 1), (2, 300)])
def test_closed_form_equals_lstsq(top_k, sweeps):
    """Of the experts together, each token's features those of its experts; with top-1 one sweep is enough."""
    sample, kept, ridge = sample_of(tokens=400), torch.tensor([0, 2, 5]), 0.1
    block = kept_block(sample, kept)
    block.router.top_k = top_k
    x, target = sample.input_TD, torch.randn(400, 32, generator=torch.Generator().manual_seed(2))
    weights = block.route(x).weights_of_all(3)
    features = []
    for e in range(3):
        gate, up = linear(x, block.experts.gate_up_proj[e]).chunk(2, -1)
        features.append(functional.silu(gate) * up * weights[:, e : e + 1])
    value = 1 / target.norm(dim=1, keepdim=True)
    value /= value.mean()
    z, y = torch.cat(features, 1).double() * value, target.double() * value
    own = torch.cat([block.down_proj[e].T for e in range(3)]).double()
    penalty = torch.cat([part.clone() for part in z.square().sum(0).chunk(3)])
    for part in penalty.chunk(3):
        part.clamp_(min=1e-3 * part.mean())
    root = (ridge * penalty).sqrt().diag()
    expected = torch.linalg.lstsq(torch.cat([z, root]), torch.cat([y, root @ own])).solution
    found = recover(block, x, target, weights, ridge, sweeps)
    torch.testing.assert_close(found.mT.reshape(-1, 32), expected.float(), rtol=1e-2, atol=2e-3)


def test_recovery_lessens_the_error_it_fits(folders, tmp_path):
    result = moesaic.prune(folders("qwen3-moe"), tmp_path / "out", config("random", "closed-form"))
    assert all(layer.error < layer.split_error for layer in result.layers)


@pytest.mark.parametrize("method", [name for name in registry.names("pruning") if name != "depth"])
def test_every_method_works_and_repeats_itself(method, folders, tmp_path):
    results = [
        moesaic.prune(folders("qwen3-moe"), tmp_path / str(n), config(method, "closed-form", ratio=0.5))
        for n in range(2)
    ]
    assert results[0].num_experts == 3
    assert len({json.dumps([layer.kept for layer in r.layers]) for r in results}) == 1
    first, second = (Checkpoint(tmp_path / str(n)) for n in range(2))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())


def test_shared_experts_and_the_rest_are_untouched(folders, tmp_path):
    moesaic.prune(folders("qwen2-moe"), tmp_path / "out", config("merge", "closed-form"))
    before, after = Checkpoint(folders("qwen2-moe")), Checkpoint(tmp_path / "out")
    others = [n for n in after.names() if ".experts." not in n and not n.endswith("mlp.gate.weight")]
    assert any("shared_expert" in name for name in others)
    assert all(torch.equal(before.read(name), after.read(name)) for name in others)


def test_stopped_and_gone_on_with_equals_uninterrupted(folders, tmp_path, monkeypatch):
    source, settings = folders("mixtral"), config("reap", "closed-form")
    moesaic.prune(source, tmp_path / "whole", settings)
    add = ResumableOutput.add_layer

    def stop(self, *args):
        add(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumableOutput, "add_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        moesaic.prune(source, tmp_path / "out", settings)
    monkeypatch.setattr(ResumableOutput, "add_layer", add)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="another configuration"):
        moesaic.prune(source, tmp_path / "out", config("random"))
    moesaic.prune(source, tmp_path / "out", settings)
    first, second = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "out")
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())
    assert not list(tmp_path.glob("*.partial"))


def test_routing_groups_keep_as_many_each(folders, tmp_path, monkeypatch):
    source = folders("deepseek-v3", n_routed_experts=8, n_group=2, topk_group=1)
    result = moesaic.prune(source, tmp_path / "out", config("reap"))
    assert [sum(e < 4 for e in layer.kept) for layer in result.layers if layer.kept] == [2]
    with pytest.raises(InputError, match=r"2 routing groups.* give --experts 4 or 6"):
        moesaic.prune(source, tmp_path / "no", config("reap", experts=5))
    with pytest.raises(InputError, match="naee does not search within 2 routing groups"):
        moesaic.prune(source, tmp_path / "no", config("naee"))
    tokens = torch.randint(1024, (1, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, model = loaded(tmp_path / "out")(tokens).logits, loaded(source)
        kept = [layer.kept for layer in result.layers if layer.kept]
        masking(monkeypatch, [block.router.weight for block in find_blocks(model)], kept)
        torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_predict_further_tokens_are_left_out(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    for file in folders("deepseek-v3").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    more = {f"model.layers.61.mlp.experts.{e}.up_proj.weight": torch.zeros(24, 32) for e in range(EXPERTS)}
    fields = json.loads((source / "config.json").read_text())
    skipped = AutoConfig.from_pretrained(source).num_hidden_layers
    assert skipped == 2
    save_file(tensors | more, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 1}))
    result = moesaic.prune(source, tmp_path / "out", config())
    assert "6 tensors of layers that predict further tokens were left out" in result.notes[0]
    assert Checkpoint(tmp_path / "out").config["num_nextn_predict_layers"] == 0
    assert not [name for name in Checkpoint(tmp_path / "out").names() if "layers.61" in name]


CONVERTED = {"plan": "S1A2E8", "tokens": 1_024, "window": 64, "held_out_tokens": 256, "partition": "coactivation"}


@pytest.fixture(scope="module", params=["glm4_moe", "moesaic"])
def converted(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    moesaic.convert("tiny", out, moesaic.ConvertConfig(**CONVERTED, format=request.param), force=True)
    return out


def test_a_converted_model_stays_one(converted, tmp_path, run):
    out = tmp_path / "out"
    result = moesaic.prune(converted, out, config(experts=5))
    assert Checkpoint(out).config["model_type"] == Checkpoint(converted).config["model_type"]
    tokens = torch.randint(1024, (1, 48), generator=torch.Generator().manual_seed(3))
    model, tokenizer = moesaic.load(out, dtype=torch.float32)
    full, _ = moesaic.load(converted, dtype=torch.float32)
    assert model.config.num_experts == 5
    for block, layer in zip(find_blocks(full), result.layers, strict=True):
        bias = block.router.e_score_correction_bias
        bias.data[[e for e in range(7) if e not in layer.kept]] = -1e9
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, full(tokens).logits, rtol=1e-4, atol=1e-4)
    metrics, before = moesaic.inspect(out).metrics, moesaic.inspect(converted).metrics
    assert metrics.plan == "S1A2E6"
    assert metrics.perplexity_protocol == before.perplexity_protocol == result.perplexity_protocol
    assert result.perplexity_before == pytest.approx(before.perplexity, rel=0.02)  # on the text that it was measured on
    assert metrics.ffn_active == before.ffn_active
    assert moesaic.inspect(out).metrics.layers[0].expert_tokens == result.layers[0].expert_tokens
    assert moesaic.evaluate(model, tokenizer, window=64, max_tokens=128).perplexity > 1
    assert [(change.verb, change.method, change.what) for change in metrics.changes] == [
        ("pruned", "frequency", "5 of 7 experts a layer, recovery none")
    ]
    card = " ".join((out / "README.md").read_text().split())
    assert "Then pruned (`frequency`): 5 of 7 experts a layer, recovery none; " in card
    assert "layer_error.png" not in card
    other = "moesaic" if Checkpoint(out).config["model_type"] != "moesaic" else "glm4_moe"
    moesaic.export(out, tmp_path / "other", other)
    training = moesaic.FinetuneConfig(window=64, samples=24, batch=4, steps=2, device="cpu")
    moesaic.finetune(out, tmp_path / "trained", training)
    assert "Then pruned" in (tmp_path / "trained" / "README.md").read_text()
    code, _, err = run("generate", out, "The first", "--max-new-tokens", "2")
    assert code == 0, err


def test_a_conversion_that_collapsed_stays_one_that_did(converted, tmp_path):
    strict = shutil.copytree(converted, tmp_path / "strict")
    settings = yaml.safe_load((strict / "moesaic.yaml").read_text())
    settings["config"]["collapse_ratio"] = 1.0
    (strict / "moesaic.yaml").write_text(yaml.safe_dump(settings))
    result = moesaic.prune(strict, tmp_path / "out", config(experts=6))
    assert not result.collapsed  # beside what it was pruned from
    assert moesaic.inspect(tmp_path / "out").metrics.collapsed
    assert "This model collapsed" in (tmp_path / "out" / "README.md").read_text()


def test_training_before_pruning_keeps_its_own_numbers(converted, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.training.prepare.compute_dtype", lambda dtype, device: torch.float32)  # everywhere
    training = moesaic.FinetuneConfig(window=64, samples=24, batch=4, steps=10, device="cpu", learning_rate=1e-3)
    trained = moesaic.finetune(converted, tmp_path / "trained", training)
    assert trained.improved
    moesaic.prune(tmp_path / "trained", tmp_path / "out", config(experts=3))
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"perplexity {trained.perplexity_before:.3f} before, {trained.perplexity:.3f} after; loss" in card


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("verb", ["prune", "adapt", "finetune", "export"])
def test_out_is_not_the_model_itself(converted, tmp_path, verb, inside):
    model = shutil.copytree(converted, tmp_path / "a" / "model")
    out = tmp_path / "a" if inside else model
    (tmp_path / "a" / "moesaic.yaml").touch()  # as if it were ours
    before = sorted(tmp_path.rglob("*"))
    settings = {
        "prune": config(experts=3), "adapt": moesaic.AdaptConfig(method="top-p", window=64, samples=16),
        "finetune": moesaic.FinetuneConfig(window=64, samples=16, steps=1), "export": "auto",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"is the model that is read, '.*'; name another OUT"):
        getattr(moesaic, verb)(model, out, settings[verb], overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_given_number_takes_the_place_of_the_recipes(tmp_path):
    (tmp_path / "a.yaml").write_text("ratio: 0.25\ntokens: 512\n")
    found = PruneConfig.read(tmp_path / "a.yaml", {"experts": 12})
    assert (found.experts, found.ratio, found.tokens) == (12, None, 512)
    assert PruneConfig.read(tmp_path / "a.yaml", {"seed": 3}).ratio == 0.25


@pytest.mark.parametrize(("router", "says"), [("mlp", "width is the number of its experts"), ("sigmoid", "the router")])
def test_routers_that_depend_on_the_number_of_experts_are_refused(router, says, tmp_path):
    settings = moesaic.ConvertConfig(**CONVERTED, router=router, recovery="none")
    moesaic.convert("tiny", tmp_path / "out", settings, force=True)
    with pytest.raises(InputError, match=says):
        moesaic.prune(tmp_path / "out", tmp_path / "pruned", config())
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("model", "words", "says"),
    [
        ("tiny", "--experts 4", "is no Mixture of Experts"),
        ("MODEL", "--experts 7", "--experts 7 is more than the 6 experts"),
        ("MODEL", "--experts 1", "--experts 1 leaves 1 experts, and a token runs 2 of them; give --experts 2 at least"),
        ("MODEL", "--ratio 0.9", "a --ratio of 0.667 at most"),
        ("MODEL", "--ratio 1.5", "--ratio is 1.5; give a number from 0 to 1"),
        ("MODEL", "--ratio nan", "--ratio is nan"),
        ("MODEL", "--experts 0", "--experts is 0; give a whole number from 1"),
        ("MODEL", "--experts 4 --ratio 0.5", "both are given"),
        ("MODEL", "", "neither is given"),
        ("MODEL", "--experts 4 --method raep", "Did you mean 'reap'"),
        ("MODEL", "--experts 4 --recovery lora", "--recovery is 'lora'"),
        ("MODEL", "--experts 4 --method naee:sets=-1", "option sets of pruning 'naee'"),
        ("MODEL", "--experts 4 --calibration missing.txt", "no text file 'missing.txt'"),
        ("MODEL", "--experts 4 --tokens 10", "less than one window"),
        ("demmo", "--experts 4", "Did you mean 'demo'"),
        ("GPT", "--experts 4 --method merge --recovery none", "use --method reap --recovery none"),
        ("GPT", "--experts 4", "--recovery closed-form reads experts neuron by neuron"),
        ("LLAMA4", "--experts 4 --recovery none", "Llama-4's"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, folders, tmp_path, model, words, says):
    named = {"MODEL": "qwen3-moe", "GPT": "gpt-oss", "LLAMA4": "llama4"}
    model = folders(named[model]) if model in named else model
    code, out, err = run("prune", model, tmp_path / "out", *words.split())
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(run, folders, tmp_path):
    words = ["prune", folders("qwen3-moe"), tmp_path / "out", "--ratio", "0.5", "--tokens", "512", "--window", "64"]
    code, out, err = run(*words, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["num_experts"], facts["num_experts_before"], facts["method"]) == (3, 6, "reap")
    assert math.isfinite(facts["perplexity"])
    code, _, err = run(*words)
    assert code == 2
    assert "exists; choose another folder or pass --overwrite" in err
    code, out, err = run(*words, "--overwrite")
    assert (code, out) == (0, "")
    assert "experts a layer" in err


def test_a_collapse_is_refused(folders, tmp_path):
    with pytest.raises(moesaic.WorkError, match="collapsed"):
        moesaic.prune(folders("olmoe"), tmp_path / "out", config(collapse_ratio=0.1))
    assert not (tmp_path / "out").exists()
    assert moesaic.prune(folders("olmoe"), tmp_path / "out", config(collapse_ratio=0.1), force=True).collapsed
