"""The frontier resumes, orders the methods, and its bound is what it says."""

import json

import pytest
import torch

from conftest import small_model
from moesaic import InputError
from moesaic.evaluation.neurons import TopNeurons, top_neurons
from moesaic.frontier import METHODS, Measurement, frontier, summarise
from moesaic.models.families import decoder_layers, ffn_name, gated_ffn

MEASUREMENT = Measurement(tokens=2_048, max_tokens=4_096, speed=False)


@torch.no_grad()
def test_all_neurons_are_the_dense_model_and_it_comes_back():
    model = small_model("qwen2")
    tokens = torch.arange(40)[None]
    dense = model(tokens).logits
    with top_neurons(model, 1.0):
        torch.testing.assert_close(model(tokens).logits, dense)
    with top_neurons(model, 0.1):
        assert (model(tokens).logits - dense).abs().max() > 1e-3
    assert torch.equal(model(tokens).logits, dense)


@torch.no_grad()
def test_top_neurons_equal_the_naive_loop():
    layer = decoder_layers(small_model("llama"))[0]
    ffn = gated_ffn(layer.get_submodule(ffn_name(layer)))
    x = torch.randn(5, 32)
    expected = []
    for token in x:
        h = ffn.hidden(token)
        keep = (h.abs() * ffn.down_DF.norm(dim=0)).argsort(descending=True)[:7]
        expected.append(ffn.down_DF[:, keep] @ h[keep])
    torch.testing.assert_close(TopNeurons(ffn, 7)(x), torch.stack(expected))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier")
    methods = ("specialists", "static+closed-form", "flap", "cmoe", "neurons")
    return out, frontier("tiny", out, active=[0.25], methods=methods, measurement=MEASUREMENT)


def test_the_methods_come_in_their_order(measured):
    ratio = {row["method"]: row["perplexity_ratio"] for row in measured[1]["rows"]}
    assert 1 < ratio["neurons"] < ratio["specialists"] < ratio["static+closed-form"] < ratio["flap"] < ratio["cmoe"]


def test_rows_and_charts_are_kept_and_not_measured_again(measured, monkeypatch):
    out, result = measured
    assert {"frontier.json", "frontier.png", "frontier.svg"} == {p.name for p in out.iterdir()}
    assert json.loads((out / "frontier.json").read_text()) == json.loads(json.dumps(result))
    monkeypatch.setattr("moesaic.frontier.convert", None)
    again = frontier("tiny", out, active=[0.25], methods=["flap", "cmoe"], measurement=MEASUREMENT)
    assert again["rows"] == result["rows"]
    with pytest.raises(InputError, match=r"another .*tokens"):
        frontier("tiny", out, measurement=Measurement(tokens=1_024))


def test_bad_requests_are_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'specialists'"):
        frontier("tiny", tmp_path / "f", methods=["specialist"])
    with pytest.raises(InputError, match="at most 1"):
        frontier("tiny", tmp_path / "f", active=[25])
    with pytest.raises(InputError, match="no text file"):
        frontier("tiny", tmp_path / "f", measurement=Measurement(text="missing.raw"))
    assert not (tmp_path / "f").exists()


def test_the_summary_has_means_and_deviations_over_seeds():
    row = {"method": "cmoe", "active": 0.5, "memory_factor": 1.0, "ffn_active": 0.5, "memory": 1.0, "plan": "S3A3E12"}
    row |= {"partition": "cmoe", "speedup": 1.2}
    rows = [row | {"seed": seed, "perplexity_ratio": ratio} for seed, ratio in enumerate((2.0, 3.0, 4.0))]
    other = row | {"method": "flap", "seed": 0, "perplexity_ratio": 5.0, "speedup": None}
    narrow = other | {"method": "static", "plan": "S6A0E12"}
    line, same_shape, other_shape = summarise([*rows, other, narrow])
    assert (line["perplexity_ratio"], line["perplexity_ratio_deviation"], line["seeds"]) == (3.0, 1.0, 3)
    assert (same_shape["speedup"], other_shape["speedup"]) == (1.2, None)


def test_every_method_can_be_asked_for():
    for name, method in METHODS.items():
        assert method.recovery in {"none", "closed-form"}, name
