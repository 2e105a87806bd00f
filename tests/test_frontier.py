"""The frontier resumes, orders the methods, and its bound is what it says."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from conftest import FAMILIES, small_model
from moesaic import InputError
from moesaic.comparison.baselines.neurons import Neurons, NeuronsFFN
from moesaic.comparison.baselines.sparse import sparse, unlearnt
from moesaic.comparison.frontier import frontier
from moesaic.comparison.recipes import BASELINES, METHODS
from moesaic.comparison.rows import Measurement, Point, shape_of, summarise
from moesaic.comparison.speed import shaped
from moesaic.conversion.auto import candidates
from moesaic.evaluation.cost import active_weights, ffn_of
from moesaic.models.families import decoder_layers, ffn_name, gated_ffn
from moesaic.moe.kernels import is_column_major
from moesaic.moe.modeling import moe_blocks
from moesaic.plan import Plan
from moesaic.results import FrontierRow

MEASUREMENT = Measurement(tokens=2_048, max_tokens=4_096, speed=False)


@torch.no_grad()
def test_all_neurons_are_the_dense_model_and_it_comes_back():
    model = small_model("qwen2")
    tokens = torch.arange(40)[None]
    dense = model(tokens).logits
    with sparse(model, Neurons(), 1.0, unlearnt()):
        torch.testing.assert_close(model(tokens).logits, dense)
    with sparse(model, Neurons(), 0.1, unlearnt()):
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
    found = NeuronsFFN(ffn, {}, 7 / ffn.intermediate_size)(x)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier")
    methods = ("specialists", "static+closed-form", "flap", "cmoe", "neurons")
    return out, frontier("tiny", out, active=[0.25], methods=methods, measurement=MEASUREMENT)


def test_the_methods_come_in_their_order(measured):
    ratio = {row.method: row.perplexity_ratio for row in measured[1].rows}
    assert 1 < ratio["neurons"] < ratio["specialists"] < ratio["static+closed-form"] < ratio["flap"] < ratio["cmoe"]


def test_rows_and_charts_are_kept_and_not_measured_again(measured, monkeypatch):
    out, result = measured
    assert {"frontier.json", "frontier.png", "frontier.svg"} == {p.name for p in out.iterdir()}
    assert json.loads((out / "frontier.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert all(row.machine and row.versions["torch"] == torch.__version__ for row in result.rows)
    monkeypatch.setattr("moesaic.comparison.frontier.convert", None)
    again = frontier("tiny", out, active=[0.25], methods=["flap", "cmoe"], measurement=MEASUREMENT)
    assert again.rows == result.rows
    with pytest.raises(InputError, match=r"another .*tokens"):
        frontier("tiny", out, measurement=Measurement(tokens=1_024))


def test_speed_is_measured_later_and_once_a_shape(measured, monkeypatch):
    out, before = measured
    monkeypatch.setattr("moesaic.comparison.frontier.convert", None)
    ask = {"active": [0.25], "methods": ["flap"], "measurement": replace(MEASUREMENT, speed=True)}
    result = frontier("tiny", out, **ask)
    speedup = {row.method: row.speedup for row in result.rows}
    assert speedup.pop("neurons") is None
    shapes = {(row.plan, row.expert_width) for row in result.rows if row.plan}
    assert speedup["flap"] == speedup["static+closed-form"] > 0
    assert {(speed.plan, speed.expert_width) for speed in result.speeds} == shapes
    assert len(result.speeds) == len(shapes) < len(before.rows)
    assert {row.method: row.speedup for row in result.summary}["cmoe"] == speedup["cmoe"] > 0
    monkeypatch.setattr("moesaic.comparison.frontier.shape_speed", None)
    assert frontier("tiny", out, **ask).speeds == result.speeds
    file = out / "frontier.json"
    rows = [replace(row, speedup=None) for row in result.rows]
    file.write_text(json.dumps(replace(result, rows=rows).to_dict()))
    unmeasured = frontier("tiny", out, **ask | {"measurement": MEASUREMENT})
    assert unmeasured.rows == result.rows  # a shape that is known is not lost on rows that came later
    monkeypatch.setattr("moesaic.comparison.frontier.machine", lambda: "another machine")
    monkeypatch.setattr("moesaic.comparison.frontier.shape_speed", lambda *_: replace(result.speeds[0], speedup=7.0))
    assert {row.speedup for row in frontier("tiny", out, **ask).rows} == {7.0, None}


def test_routing_by_an_oracle_is_a_bound_without_a_speed():
    row = FrontierRow(
        method="coactivation-oracle", active=0.25, memory_factor=1.0, seed=0, plan="S1A1E8", expert_width=16,
        ffn_active=0.25, perplexity=20.0, perplexity_ratio=2.0,
    )  # fmt: skip
    assert shape_of(row) is None
    assert shape_of(replace(row, method="cmoe")) == ("S1A1E8", 16)


@torch.no_grad()
@pytest.mark.parametrize("plan", [Plan(1, 1, 8, 16), Plan(0, 2, 8, 8), Plan(3, 0, 8, 8)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_reads_the_bytes_of_a_conversion_and_is_dense_outside_its_ffns(family, plan):
    dense = small_model(family)
    model = shaped(dense, plan)
    outside = active_weights(dense) - sum(p.numel() for b in map(ffn_of, decoder_layers(dense)) for p in b.parameters())
    neurons = (plan.shared + plan.num_experts_per_tok) * plan.width
    routers = plan.num_experts * (dense.config.hidden_size + 1)
    layer = 3 * dense.config.hidden_size * neurons + routers
    assert active_weights(model) == outside + dense.config.num_hidden_layers * layer
    assert model.model.embed_tokens.weight.data_ptr() == dense.model.embed_tokens.weight.data_ptr()
    assert model(torch.arange(9)[None]).logits.isfinite().all()
    downs = [block.experts.down_proj for block in moe_blocks(model) if block.experts is not None]
    assert all(map(is_column_major, downs))  # as a conversion that is loaded


def test_bad_requests_are_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'specialists'"):
        frontier("tiny", tmp_path / "f", methods=["specialist"])
    with pytest.raises(InputError, match="at most 1"):
        frontier("tiny", tmp_path / "f", active=[25])
    with pytest.raises(InputError, match="at most 1"):
        frontier("tiny", tmp_path / "f", active=[1.5], methods=["neurons"])
    with pytest.raises(InputError, match="no text file"):
        frontier("tiny", tmp_path / "f", measurement=Measurement(text="missing.raw"))
    assert not (tmp_path / "f").exists()


def test_the_summary_has_means_and_deviations_over_seeds():
    row = FrontierRow(
        method="cmoe", active=0.5, memory_factor=1.0, ffn_active=0.5, memory=1.0, plan="S3A3E12", partition="cmoe",
        speedup=1.2, seed=0, perplexity=20.0, perplexity_ratio=2.0,
    )  # fmt: skip
    rows = [replace(row, seed=seed, perplexity_ratio=ratio) for seed, ratio in enumerate((2.0, 3.0, 4.0))]
    line, other = summarise([*rows, replace(row, method="flap", perplexity_ratio=5.0, speedup=None)])
    assert (line.perplexity_ratio, line.perplexity_ratio_deviation, line.seeds) == (3.0, 1.0, 3)
    assert (line.speedup, other.speedup, other.seeds) == (1.2, None, 1)
    assert len(summarise([*rows, replace(row, plan="S1A1E4", seed=3, perplexity_ratio=1.0)])) == 2


@pytest.mark.parametrize("name", [name for name in METHODS if name != "read-me"])
def test_every_method_fits_tiny(name):
    for conversion in candidates("tiny", Point(name, 0.25, 1.0, 0).config(MEASUREMENT)):
        assert conversion.plan.ffn_active(conversion.layerwise.config.intermediate_size) == pytest.approx(
            0.25, abs=0.01
        )


def test_all_leaves_out_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.comparison.frontier._measure", lambda model, point, *_: row_of(point))
    result = frontier("tiny", tmp_path, active=[0.25], methods=["all"], measurement=MEASUREMENT)
    third = {"cats", "cats+closed-form", "cats-top-k"}
    assert {row.method for row in result.rows} == {*METHODS, *BASELINES} - {"read-me"} - third
    assert set(result.unfit) == {f"{name}, 25% active" for name in ("read-me", *third)}
    assert "domain of text for each expert" in result.unfit["read-me, 25% active"]
    with pytest.raises(InputError, match="no text file"):
        frontier("tiny", tmp_path, methods=["all"], measurement=Measurement(calibration=("missing.txt",)))


def row_of(point):
    """A row that was not measured."""
    return FrontierRow(
        **asdict(point), plan=None, ffn_active=point.active, memory=1.0, perplexity=20.0, perplexity_ratio=2.0
    )


def test_a_stopped_conversion_waits_for_its_turn(tmp_path, monkeypatch):
    """The folder of a point is its own, so that another method in between does not meet half of it."""
    folders = []

    def stop(model, output, config, **_):
        folders.append(output)
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.comparison.frontier.convert", stop)
    for method in ("cmoe", "flap", "cmoe"):
        with pytest.raises(KeyboardInterrupt):
            frontier("tiny", tmp_path, active=[0.25], methods=[method], measurement=MEASUREMENT)
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_what_is_no_frontier_is_refused(tmp_path, content):
    (tmp_path / "frontier.json").write_text(content)
    with pytest.raises(InputError, match="is no frontier's"):
        frontier("tiny", tmp_path, active=[0.25], methods=["flap"], measurement=MEASUREMENT)
