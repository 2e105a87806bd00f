"""What practitioners would pick beside conversions: mathematics first, then their rows in the frontier."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoTokenizer

from conftest import random_sample, small_model
from moesaic import ConvertConfig, InputError
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.writer import ResumableOutput
from moesaic.comparison.baselines import UndefinedBudget, build
from moesaic.comparison.baselines.base import calibration
from moesaic.comparison.baselines.cats import GATE, Cats
from moesaic.comparison.baselines.depth import Weights, layers_at, weights_of
from moesaic.comparison.baselines.sparse import DOWN, Learnt, largest, recovered, sparse, threshold
from moesaic.comparison.baselines.teal import HIDDEN, INPUT, Teal
from moesaic.comparison.baselines.wina import Wina
from moesaic.comparison.frontier import frontier
from moesaic.comparison.recipes import BASELINES
from moesaic.comparison.rows import Measurement, Point
from moesaic.comparison.speed import is_depth, shallow
from moesaic.conversion.prepare import prepare
from moesaic.evaluation.cost import active_weights
from moesaic.models.families import GatedFFN, decoder_layers
from moesaic.recovery._refit import FitSample, refit
from moesaic.report.frontier import decode

MEASUREMENT = Measurement(tokens=4_096, max_tokens=2_048, speed=False)
SPARSE = [Cats(top_k=True), Cats(), Teal(top_k=True), Teal(), Wina()]


def name(method):
    return type(method).__name__ + "-top-k" * getattr(method, "top_k", False)


@torch.no_grad()
@pytest.mark.parametrize("method", SPARSE, ids=name)
def test_everything_kept_is_the_dense_ffn_and_everything_is_read(method):
    sample = random_sample()
    ffn = method.ffn(sample.ffn, method.fit(sample, 1.0), 1.0)
    torch.testing.assert_close(ffn(sample.input_TD), sample.output_TD)
    assert ffn.read / ffn.tokens == pytest.approx(1)


def test_a_tokens_largest_are_those_that_sorting_finds():
    value = torch.randn(20, 30)
    for density in (0.01, 0.3, 0.5, 1.0):
        count = max(1, round(density * 30))
        kept = largest(value, density)
        for token in range(20):
            assert set(kept[token].nonzero().flatten().tolist()) == set(value[token].argsort()[-count:].tolist())


def test_a_threshold_is_reached_by_its_share_of_values():
    value = torch.randperm(1_000).float()
    for density in (0.001, 0.25, 0.5, 0.999, 1.0):
        found = threshold(value.split(300), density)
        assert int((value >= found).sum()) == max(1, round(density * 1_000))
        assert found == value.sort().values[1_000 - max(1, round(density * 1_000))]


@torch.no_grad()
def test_cats_keeps_neurons_by_their_gate():
    """The naive loop of the paper's equation, with the threshold that half of the calibration values reach."""
    sample = random_sample(tokens=60)
    ffn, dense = Cats().ffn(sample.ffn, tensors := Cats().fit(sample, 0.5), 0.5), sample.ffn
    gates = dense.act_fn(linear(sample.input_TD, dense.gate_FD)).abs()
    assert tensors[GATE] == gates.flatten().sort().values[60 * 48 // 2]
    for token in range(60):
        expected, x = torch.zeros(16), sample.input_TD[token]
        for neuron in range(48):
            a = dense.act_fn(dense.gate_FD[neuron] @ x)
            if a.abs() >= tensors[GATE]:
                expected += a * (dense.up_FD[neuron] @ x) * dense.down_DF[:, neuron]
        torch.testing.assert_close(ffn(x[None])[0], expected, rtol=1e-4, atol=1e-5)
    assert ffn.read / ffn.tokens == pytest.approx((1 + 2 * 0.5) / 3, abs=1e-3)


def test_cats_has_a_third_of_the_ffn_to_pay_first():
    assert Cats().density(0.5) == pytest.approx(0.25)
    assert Cats().density(1.0) == 1
    with pytest.raises(UndefinedBudget, match="does not exist at 33%"):
        Cats().density(1 / 3)


@torch.no_grad()
def test_teal_skips_small_inputs_of_each_matrix():
    sample = random_sample(tokens=40)
    tensors = Teal().fit(sample, 0.5)
    z = torch.where(sample.input_TD.abs() >= tensors[INPUT], sample.input_TD, 0)
    h = sample.ffn.hidden(z)
    assert (z != 0).float().mean() == pytest.approx(0.5)
    assert (h.abs() >= tensors[HIDDEN]).float().mean() == pytest.approx(0.5)
    expected = linear(torch.where(h.abs() >= tensors[HIDDEN], h, 0), sample.ffn.down_DF)
    ffn = Teal().ffn(sample.ffn, tensors, 0.5)
    torch.testing.assert_close(ffn(sample.input_TD), expected)
    assert ffn.read / ffn.tokens == pytest.approx(0.5, abs=1e-3)


@torch.no_grad()
def test_wina_weighs_inputs_by_their_columns_and_is_teal_where_those_are_alike():
    sample = random_sample(tokens=30)
    dense, x = sample.ffn, sample.input_TD
    for token in range(30):
        parts = []
        for weight in (dense.gate_FD, dense.up_FD):
            kept = (x[token].abs() * weight.norm(dim=0)).argsort(descending=True)[:8]
            parts.append(weight[:, kept] @ x[token, kept])
        h = dense.act_fn(parts[0]) * parts[1]
        kept = (h.abs() * dense.down_DF.norm(dim=0)).argsort(descending=True)[:24]
        found = Wina().ffn(dense, {}, 0.5)(x[token][None])[0]
        torch.testing.assert_close(found, dense.down_DF[:, kept] @ h[kept], rtol=1e-4, atol=1e-5)
    columns = [weight / weight.norm(dim=0) for weight in (dense.gate_FD, dense.up_FD, dense.down_DF)]
    even = GatedFFN(*columns, dense.act_fn)
    wina, teal = Wina().ffn(even, {}, 0.5), Teal(top_k=True).ffn(even, {}, 0.5)
    torch.testing.assert_close(wina(x), teal(x))
    assert wina.read == teal.read


@torch.no_grad()
def test_closed_form_is_least_squares_on_what_is_not_skipped():
    sample = random_sample()
    method = Cats(recovery="closed-form")
    tensors = method.fit(sample, 0.3)
    ffn = method.ffn(sample.ffn, tensors, 0.3)
    found = recovered(ffn, sample)
    torch.testing.assert_close(found, refit(ffn.hidden, sample.ffn.down_DF, FitSample.of(sample)))
    weight, masked = sample.weight_T[:, None], ffn.hidden(sample.input_TD)
    assert (masked == 0).float().mean() == pytest.approx(0.7, abs=0.01)

    def error(down):
        return ((linear(masked, down) - sample.output_TD) * weight).norm()

    assert error(found) < error(sample.ffn.down_DF)
    again = method.ffn(sample.ffn, tensors | {DOWN: found}, 0.3)
    torch.testing.assert_close(again(sample.input_TD), linear(masked, found))


@torch.no_grad()
def test_methods_fit_every_family_and_the_model_comes_back(family):
    model, tokens = small_model(family), torch.arange(40)[None]
    dense, state = model(tokens).logits, {n: t.clone() for n, t in model.state_dict().items()}
    for method in (Cats(top_k=True), Teal(top_k=True), Wina()):
        with sparse(model, method, 1.0, Learnt([], {}, None)):
            torch.testing.assert_close(model(tokens).logits, dense, rtol=1e-3, atol=1e-4)
        with sparse(model, method, 0.2, Learnt([], {}, None)):
            assert (model(tokens).logits - dense).abs().max() > 1e-3
    norm = next(n for n, _ in model.named_parameters() if n.endswith("model.norm.weight"))
    with sparse(model, Wina(), 1.0, Learnt([], {norm: 2 * model.get_parameter(norm)}, None)):
        assert not torch.allclose(model(tokens).logits, dense)
    assert torch.equal(model(tokens).logits, dense)
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())


def test_baselines_learn_from_what_a_conversion_would(tmp_path):
    """Models with a chat template are calibrated on answers too, whichever way they are made smaller."""
    source = tmp_path / "in"
    small_model("qwen2").save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    for template in (None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(source)
        found = prepare(str(source), ConvertConfig(partition="coactivation", active=0.5, tokens=1_024, window=64))
        assert calibration(str(source), Measurement()) == found.config.calibration
        assert bool(found.config.calibration) == bool(template)
    assert calibration(str(source), Measurement(calibration=("a.txt",))) == ("a.txt",)


def test_layers_at_equal_bytes_are_the_nearest():
    qwen = Weights(outside=136_134_656 + 896, layer=14_912_384, ffn=13_074_432, layers=24)
    assert [layers_at(qwen, share) for share in (0.25, 0.5, 0.75, 1.0)] == [8, 13, 19, 24]
    assert layers_at(Weights(outside=0, layer=10.0, ffn=9.0, layers=4), 1e-6) == 1


def test_weights_are_those_of_the_model(folders, family):
    model = small_model(family)
    found = weights_of(str(folders(family)))
    assert found.dense == active_weights(model)
    assert (found.layers, found.ffn) == (3, 3 * 32 * 96)


@torch.no_grad()
def test_a_shallow_model_is_the_first_layers_and_shares_their_weights(family):
    model, tokens = small_model(family), torch.arange(24)[None]
    few = shallow(model, 2)
    assert few(tokens).logits.isfinite().all()
    assert len(decoder_layers(few)) == 2
    assert active_weights(model) - active_weights(few) == sum(p.numel() for p in decoder_layers(model)[2].parameters())
    pairs = zip(decoder_layers(few).parameters(), decoder_layers(model)[:2].parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


METHODS = ("depth", "depth+closed-form", "cats", "cats+closed-form", "teal", "wina")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("baselines")
    return out, frontier("tiny", out, active=[0.25, 0.5], methods=METHODS, measurement=MEASUREMENT)


def test_rows_say_what_they_cost_and_under_what_conditions(measured):
    rows = {(row.method, row.active): row for row in measured[1].rows}
    assert {name for name, _ in rows} == set(METHODS)
    dense = weights_of("tiny")
    for (method, active), row in rows.items():
        less = (1 - row.ffn_active) * dense.layers * dense.ffn
        assert row.active_parameters == pytest.approx(dense.dense - less, abs=1)
        if method.startswith("depth"):
            assert is_depth(SimpleNamespace(plan=row.plan))
            assert (row.speedup, row.speed_is, row.bound) == (None, None, None)
        else:
            assert row.ffn_active == pytest.approx(active, abs=0.04)
            assert row.speedup == pytest.approx(dense.dense / row.active_parameters, rel=1e-4)
            assert row.speed_is == "limit"
            assert "batch 1" in row.bound
    assert rows["depth+closed-form", 0.5].perplexity < rows["depth", 0.5].perplexity
    assert rows["cats+closed-form", 0.5].perplexity < rows["cats", 0.5].perplexity


def test_a_budget_without_cats_is_left_out_and_said(measured, tmp_path):
    result = measured[1]
    assert set(result.unfit) == {"cats, 25% active", "cats+closed-form, 25% active"}
    assert all("give --active above 33.3" in reason for reason in result.unfit.values())
    with pytest.raises(InputError, match="a third of the FFN"):
        frontier("tiny", tmp_path / "out", active=[0.25], methods=["cats"], measurement=MEASUREMENT)
    assert not (tmp_path / "out").exists()


def test_limits_are_marked_and_the_files_are_whole(measured):
    out, result = measured
    found = json.loads((out / "frontier.json").read_text())
    assert {row["method"] for row in found["rows"] if row.get("speed_is") == "limit"} == set(METHODS[2:])
    assert {p.name for p in out.iterdir()} == {"frontier.json", "frontier.png", "frontier.svg"}
    shown = {row.method: decode(row) for row in result.summary}
    assert shown["depth"] == "-"
    assert shown["teal"].startswith("≤1.")


def test_depth_is_timed_as_the_model_that_it_is(measured, monkeypatch):
    out = measured[0]
    ask = {"active": [0.5], "methods": ["depth", "teal"], "measurement": replace(MEASUREMENT, speed=True)}
    result = frontier("tiny", out, **ask)
    assert {(row.method, row.speed_is) for row in result.rows if row.active == 0.5} == {
        (name, "measured" if name.startswith("depth") else "limit") for name in METHODS
    }
    [speed] = result.speeds
    assert speed.plan == "2 of 4 layers"
    assert speed.details["limit"] > 1
    monkeypatch.setattr("moesaic.comparison.frontier.depth_speed", None)
    assert frontier("tiny", out, **ask).speeds == result.speeds


def test_a_stopped_baseline_goes_on_where_it_was(measured, tmp_path, monkeypatch):
    add, done = ResumableOutput.add_layer, []

    def stop(self, *args):
        add(self, *args)
        done.append(len(self.layers))
        raise KeyboardInterrupt

    ask = {"active": [0.5], "methods": ["cats+closed-form"], "measurement": MEASUREMENT}
    monkeypatch.setattr(ResumableOutput, "add_layer", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            frontier("tiny", tmp_path, **ask)
    assert done == [1, 2]
    monkeypatch.setattr(ResumableOutput, "add_layer", add)
    [row] = frontier("tiny", tmp_path, **ask).rows
    [whole] = [r for r in measured[1].rows if (r.method, r.active) == ("cats+closed-form", 0.5)]
    assert row.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"frontier.json", "frontier.png", "frontier.svg"}


def test_what_cannot_be_is_refused_before_any_work(tmp_path, folders):
    with pytest.raises(InputError, match="Did you mean 'cats'"):
        frontier("tiny", tmp_path / "f", methods=["cat"])
    missing = Measurement(calibration=("missing.txt",))
    for method in ("depth", "cats", "teal"):
        with pytest.raises(InputError, match="no text file"):
            frontier("tiny", tmp_path / "f", methods=[method], measurement=missing)
    for method in BASELINES:
        if method != "neurons":
            with pytest.raises(InputError):
                build(method).check("tiny-moe", Point(method, 0.5, 1.0, 0), MEASUREMENT)
    assert not (tmp_path / "f").exists()
