"""Decoder layers left out of any model: mathematics first, then whole models, then bad input."""

import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import moesaic
from conftest import FAMILIES, QUICK, SMALL, random_sample, small_model
from moesaic import InputError, PruneConfig
from moesaic.calibration.layers import relative_weights, tapped
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.writer import ResumableOutput
from moesaic.evaluation.cost import active_weights
from moesaic.models.families import decoder_layers, gated_ffn, text_tower
from moesaic.models.layerwise import LayerwiseModel
from moesaic.models.norms import ffn_norm
from moesaic.pruning.depth.heal import ffn_output, fitted_gain, heal
from moesaic.pruning.depth.prepare import distances
from moesaic.pruning.methods import LayerPruner
from moesaic.pruning.methods.depth import Depth
from moesaic.recovery._refit import FitSample, refit, weighted_error

FEW = {"tokens": 512, "window": 64, "held_out_tokens": 128, "collapse_ratio": 1e9}


@dataclass(frozen=True, kw_only=True)
class Inner(LayerPruner):
    """Layers from the second on go."""

    def span(self, drop):
        return 1

    def distance(self, before_TD, after_TD):
        return before_TD.new_zeros(len(before_TD))

    def choose(self, distances, drop):
        return list(range(1, 1 + drop))


class Skipped(nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden_states, **_):
        return hidden_states


def config(method=None, recovery="none", **more):
    wish = {} if "ratio" in more else {"layers": 2}
    return PruneConfig(**FEW | wish | {"method": method or Inner(), "recovery": recovery} | more)


def opened(folder):
    model = LayerwiseModel(folder, torch.float32, torch.device("cpu"))
    model.load_embeddings_and_head()
    return model


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def streams(model, tokens):
    """What enters each layer and what leaves the last, [L + 1] of [N, L, D]."""
    seen, layers = [], decoder_layers(model)
    hooks = [layer.register_forward_hook(lambda _m, i, o: seen.append((i[0], o))) for layer in layers]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[0][0], *(after for _, after in seen)]


TOKENS = torch.randint(1024, (3, 40), generator=torch.Generator().manual_seed(5))


def test_block_influence_is_the_naive_mean_of_cosines(folders):
    folder = folders("qwen2")
    x, layerwise = streams(loaded(folder), TOKENS), opened(folder)
    found = distances(layerwise, Depth(), layerwise.embed(TOKENS), 1, lambda *_: None)
    for before, after, value in zip(x, x[1:], found, strict=False):
        cosines = [
            float(a @ b / (a.norm() * b.norm())) for a, b in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
        ]
        assert value == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)
    assert len(found) == 3
    assert Depth().choose([0.3, 0.1, 0.2, 0.1, 0.9], 2) == [1, 3]
    assert Depth().choose([0.3, 0.1, 0.2], 0) == []


@pytest.mark.parametrize("drop", [1, 2])
def test_the_run_of_layers_is_that_of_brute_force(folders, drop):
    folder = folders("llama")
    x, layerwise, method = streams(loaded(folder), TOKENS), opened(folder), Depth(contiguous=True)
    angles = []
    for first in range(3 - drop + 1):
        pairs = zip(x[first].flatten(0, 1), x[first + drop].flatten(0, 1), strict=True)
        angle = [math.acos(min(1.0, float(a @ b / a.norm() / b.norm()))) / math.pi for a, b in pairs]
        angles.append(sum(angle) / len(angle))
    found = distances(layerwise, method, layerwise.embed(TOKENS), drop, lambda *_: None)
    assert found == pytest.approx(angles, abs=1e-4)
    best = min(itertools.combinations(range(3), drop), key=lambda c: angles[c[0]] if c[-1] - c[0] < drop else 9.0)
    assert method.choose(found, drop) == list(best)


@pytest.mark.parametrize("ridge", [0.05, 1.0])
def test_refit_is_least_squares(ridge):
    sample = random_sample()
    target = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    rows = FitSample(sample.input_TD, target, sample.weight_T)
    z = (sample.ffn.hidden(sample.input_TD) * sample.weight_T[:, None]).double()
    root = (ridge * z.square().sum(0).clamp(min=1e-3 * z.square().sum(0).mean())).sqrt().diag()
    y, own = target.double() * sample.weight_T[:, None], sample.ffn.down_DF.T.double()
    expected = torch.linalg.lstsq(torch.cat([z, root]), torch.cat([y, root @ own])).solution.T
    found = refit(sample.ffn.hidden, sample.ffn.down_DF, rows, ridge)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
    assert weighted_error(rows, ffn_output(sample.ffn, rows, found)) < weighted_error(rows, sample.output_TD)


@torch.no_grad()
def test_healing_a_layer_is_refit_towards_what_the_gap_left_out(folders):
    """Llama adds its FFN's output as it is: d - (p - y) is what it should say, p and y before the change."""
    layerwise = opened(folders("llama"))
    p = {"calibration": layerwise.embed(TOKENS)}
    d = {"calibration": torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(2))}
    with layerwise.layer(1) as layer:
        ffn = gated_ffn(layer.mlp)
        before, seen = ffn.down_DF.clone(), tapped(layerwise, 1, layer, p["calibration"])
        target = d["calibration"].flatten(0, 1)
        rows = FitSample(
            seen.input_TD, target - seen.after_NLD.flatten(0, 1) + seen.output_TD, relative_weights(target)
        )  # fmt: skip
        expected = refit(ffn.hidden, before, rows)
        assert heal(layerwise, 1, layer, p, d) == ["mlp.down_proj.weight"]
        torch.testing.assert_close(ffn.down_DF, expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(ffn.down_DF, before)
        weight = relative_weights(target)[:, None]
        after = layerwise.run(1, layer, p["calibration"]).flatten(0, 1)
        assert ((after - target) * weight).norm() < ((seen.after_NLD.flatten(0, 1) - target) * weight).norm()


@torch.no_grad()
@pytest.mark.parametrize("toward", ["noise", "itself"])
def test_healing_never_worsens_what_it_fits_and_changes_nothing_but_what_it_says(folders, family, toward):
    layerwise = opened(folders(family))
    p = {"calibration": layerwise.embed(TOKENS)}
    with layerwise.layer(0) as layer:
        old = layerwise.run(0, layer, p["calibration"])
        noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
        d = {"calibration": old + 0.3 * old.std() * noise if toward == "noise" else old}
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        changed = heal(layerwise, 0, layer, p, d)
        after = layerwise.run(0, layer, p["calibration"])
        weight = relative_weights(d["calibration"].flatten(0, 1)).view(3, 40, 1)

        def error(found):
            return ((found - d["calibration"]) * weight).norm()

        assert error(after) <= error(old) + 1e-4 * (d["calibration"] * weight).norm()
        if toward == "noise":
            assert changed
            assert error(after) < error(old)
        assert all(torch.equal(state[name], t) for name, t in layer.state_dict().items() if name not in changed)


@torch.no_grad()
def test_a_norms_gain_is_least_squares_by_channel():
    layer = decoder_layers(small_model("gemma2"))[0]
    norm, output, target = ffn_norm(layer), torch.randn(50, 32), torch.randn(50, 32)
    weight = 0.5 + torch.rand(50)
    found = fitted_gain(norm, FitSample(output, target, weight), norm.weight.float() + 1, output)
    n = output / (output.square().mean(1, keepdim=True) + norm.eps).sqrt()
    for channel in range(32):
        z, y = (weight * n[:, channel])[:, None], weight * target[:, channel]
        assert found[channel] == pytest.approx(torch.linalg.lstsq(z, y[:, None]).solution.item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_dropping_none_keeps_every_bit_and_name(family, folders, tmp_path):
    moesaic.prune(folders(family), tmp_path / "out", config("depth", "closed-form", layers=3))
    before, after = Checkpoint(folders(family)), Checkpoint(tmp_path / "out")
    assert sorted(before.names()) == sorted(after.names())
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    assert before.config == after.config


def skipped_logits(folder, removed, tokens):
    model = loaded(folder)
    layers = text_tower(model).layers
    for index in removed:
        layers[index] = Skipped()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_dropped_layer_is_one_that_is_skipped(family, folders, tmp_path):
    """Windows of 16 tokens slide in the Gemmas, whose layers alternate: each must stay of its kind."""
    result = moesaic.prune(folders(family), tmp_path / "out", config())
    assert result.removed_layers == [1]
    assert (result.num_hidden_layers_before, result.num_hidden_layers) == (3, 2)
    model = loaded(tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    kinds = getattr(loaded(folders(family)).config, "layer_types", None)
    assert getattr(model.config, "layer_types", None) == (kinds and [kinds[0], kinds[2]])
    with torch.no_grad():
        found = model(TOKENS).logits
    torch.testing.assert_close(found, skipped_logits(folders(family), [1], TOKENS), rtol=1e-4, atol=1e-4)
    assert result.max_abs_logit_error < 1e-3
    assert result.total_parameters == sum(p.numel() for p in model.parameters())


def saved(folder, model):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(folder)
    return folder


def test_kinds_that_a_layers_number_decides_are_written_out(tmp_path):
    """Qwen2's layers from `max_window_layers` on look through a window: without the list the last one would not."""
    torch.manual_seed(0)
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    source = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL | window)).eval()
    folder = saved(tmp_path / "in", source)
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(fields))
    result = moesaic.prune(folder, tmp_path / "out", config())
    assert loaded(tmp_path / "out").config.layer_types == ["full_attention", "sliding_attention"]
    assert "layer_types" in result.notes[0]
    with torch.no_grad():
        found = loaded(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, skipped_logits(folder, [1], TOKENS), rtol=1e-4, atol=1e-4)


def test_what_stays_is_healed_after_the_first_gap_only(folders, tmp_path):
    for heal_all, healed in ((True, [True, True]), (False, [True, False])):
        method = Inner(heal_all=heal_all)
        result = moesaic.prune(folders("qwen3"), tmp_path / str(heal_all), config(method, "closed-form"))
        assert [layer.source_layer for layer in result.layers] == [0, 2]
        assert [layer.healed for layer in result.layers] == healed
        assert all(layer.error < layer.split_error for layer in result.layers if layer.healed)
        assert result.max_abs_logit_error < 1e-3
        before, after = Checkpoint(folders("qwen3")), Checkpoint(tmp_path / str(heal_all))
        same = [
            torch.equal(before.read(f"model.layers.{old}.mlp.down_proj.weight"),
                        after.read(f"model.layers.{new}.mlp.down_proj.weight"))
            for new, old in ((0, 0), (1, 2))
        ]  # fmt: skip
        assert same == [not layer for layer in healed]


def test_healing_wins_back_perplexity_and_the_result_is_a_dense_model(tmp_path):
    few = {"tokens": 4_096, "window": 128, "held_out_tokens": 1_024, "ratio": 0.5}
    found = {
        recovery: moesaic.prune("tiny", tmp_path / recovery, PruneConfig(method="depth", recovery=recovery, **few))
        for recovery in ("none", "closed-form")
    }
    plain, healed = found["none"], found["closed-form"]
    assert plain.removed_layers == healed.removed_layers
    assert plain.perplexity_before < healed.perplexity < 0.9 * plain.perplexity
    assert (healed.num_hidden_layers, len(healed.distances)) == (2, 4)
    assert healed.active_parameters < healed.active_parameters_before
    for folder, count in (("tiny", healed.active_parameters_before), (tmp_path / "none", plain.active_parameters)):
        assert count == active_weights(moesaic.load(folder).model)
    converted = moesaic.convert(tmp_path / "closed-form", tmp_path / "moe", QUICK)
    assert len(converted.layers) == 2


def test_experts_that_do_not_run_are_not_counted(tmp_path):
    few = PruneConfig(method="depth", recovery="none", layers=4, tokens=512, window=64, held_out_tokens=128)
    result = moesaic.prune("tiny-moe", tmp_path / "out", few)
    model, _ = moesaic.load(tmp_path / "out")
    assert result.active_parameters == active_weights(model) < result.total_parameters / 2
    assert "- mixture-of-experts" in (tmp_path / "out" / "README.md").read_text()


def test_stopped_and_gone_on_with_equals_uninterrupted(folders, tmp_path, monkeypatch):
    source, settings = folders("gemma3"), config("depth", "closed-form")
    moesaic.prune(source, tmp_path / "whole", settings)
    add = ResumableOutput.add_layer

    def stop(self, *args):
        add(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumableOutput, "add_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        moesaic.prune(source, tmp_path / "out", settings)
    monkeypatch.setattr(ResumableOutput, "add_layer", add)
    monkeypatch.setattr("moesaic.pruning.depth.prune.distances", None)  # the layers were judged
    moesaic.prune(source, tmp_path / "out", settings)
    first, second = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "out")
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())
    assert not list(tmp_path.glob("*.partial"))


def test_layers_of_a_mixture_of_experts_go_as_they_are(tmp_path):
    from test_pruning import whole

    source = saved(tmp_path / "in", whole("mixtral", num_hidden_layers=3))
    with pytest.raises(InputError, match=r"Mixture of Experts.*--recovery none"):
        moesaic.prune(source, tmp_path / "out", config("depth", "closed-form"))
    moesaic.prune(source, tmp_path / "out", config())
    with torch.no_grad():
        found = loaded(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, skipped_logits(source, [1], TOKENS), rtol=1e-4, atol=1e-4)


def test_the_command_line_prunes_and_says_so(folders, tmp_path, run):
    few = ("--tokens", 512, "--window", 64, "--force")
    out = tmp_path / "out"
    code, said, shown = run("prune", folders("qwen2"), out, "--method", "depth", "--layers", 2, "--json", *few)
    assert code == 0, shown
    result = json.loads(said)
    assert json.loads((out / "pruning.json").read_text()) == result
    assert len(result["removed_layers"]) == 1
    assert "of 3 decoder layers" in (out / "README.md").read_text()
    code, _, shown = run("prune", folders("qwen2"), tmp_path / "b", "--method", "depth", "--ratio", 0.34, *few)
    assert (code, "layers left out" in shown) == (0, True)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("depth", {"experts": 2}, "--experts 2 is for methods that leave experts out"),
        ("depth", {}, "neither is given"),
        ("depth", {"layers": 2, "ratio": 0.5}, "both are given"),
        ("depth", {"ratio": 1}, "leaves 0 of the 3 layers"),
        ("depth", {"layers": 4}, "leaves 4 of the 3 layers"),
        ("reap", {"layers": 2}, "--layers 2 is for --method depth"),
        ("reap", {"ratio": 0.5}, r"no Mixture of Experts.*--method depth"),
    ],
)  # fmt: skip
def test_bad_wishes_are_refused_before_any_work(folders, tmp_path, method, more, message):
    with pytest.raises(InputError, match=message):
        moesaic.prune(folders("llama"), tmp_path / "out", PruneConfig(method=method, **FEW | more))
    assert not list(tmp_path.iterdir())


def test_a_conversion_is_sent_back_to_its_dense_model(folders, tmp_path):
    moesaic.convert(folders("llama"), tmp_path / "moe", QUICK)
    with pytest.raises(InputError, match=r"converted by moesaic.*prune that and convert"):
        moesaic.prune(tmp_path / "moe", tmp_path / "out", config("depth"))


def test_layers_without_a_gated_ffn_say_what_still_works(tmp_path):
    from transformers import GPTNeoXConfig

    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    source = saved(tmp_path / "in", AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes)).eval())
    with pytest.raises(InputError, match="--recovery none"):
        moesaic.prune(source, tmp_path / "out", config("depth", "closed-form"))
    moesaic.prune(source, tmp_path / "out", config())
    with torch.no_grad():
        found = loaded(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, skipped_logits(source, [1], TOKENS), rtol=1e-4, atol=1e-4)


def test_linear_features_reach_any_linear_target():
    """With more tokens than neurons and hardly a ridge, a target that some W gives is met."""
    sample = random_sample()
    other = torch.randn(16, 48, generator=torch.Generator().manual_seed(3))
    target = linear(sample.ffn.hidden(sample.input_TD), other)
    found = refit(sample.ffn.hidden, sample.ffn.down_DF, FitSample(sample.input_TD, target, sample.weight_T), 1e-6)
    torch.testing.assert_close(found, other, rtol=1e-2, atol=1e-2)
