"""The choice between the cuts is the least loss, is kept for resuming, and confidence is fitted where it says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, Lfm2Config, OlmoConfig, StableLmConfig

import moesaic
from conftest import QUICK, SMALL, small_model
from moesaic import ConvertConfig, InputError, convert
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.writer import ResumableOutput
from moesaic.conversion import auto as choice
from moesaic.conversion.auto import TIE, candidates, choose, trial, trial_windows
from moesaic.conversion.plans import plans
from moesaic.conversion.states import embed
from moesaic.conversion.temperature import STEP, fit_temperature
from moesaic.models.norms import can_scale_logits, scale_logits
from moesaic.plan import specialists_plan

AUTO = QUICK.model_copy(update={"partition": "auto", "active": 0.5})


@pytest.mark.parametrize("fine", [False, True])
def test_the_better_cut_is_taken_and_all_are_reported(tmp_path, fine):
    config = AUTO.model_copy(update={"fine": fine})
    metrics = convert("tiny", tmp_path / "out", config)
    losses = {f"{t.partition} {t.plan}": t.held_out_loss for t in metrics.trials}
    conversions = candidates("tiny", config)
    assert list(losses) == [conversion.name for conversion in conversions]
    assert losses[f"{metrics.partition} {metrics.plan}"] <= min(losses.values()) + TIE
    assert [trial(conversion) for conversion in conversions] == pytest.approx(list(losses.values()))


@pytest.mark.parametrize(
    ("losses", "taken"),
    [((3.0, 2.9), "coactivation"), ((3.0, 3.0 - TIE / 2), "specialists"), ((2.9, 3.0), "specialists")],
)
def test_the_faster_cut_wins_a_tie(tmp_path, losses, taken):
    conversions = candidates("tiny", AUTO)
    partial = ResumableOutput(tmp_path / "out", {}, resume=False)
    for conversion, loss in zip(conversions, losses, strict=True):
        partial.add_trial(conversion.name, loss)
    conversion, trials = choose(conversions, partial)
    assert conversion.config.partition == taken
    assert tuple(t.held_out_loss for t in trials) == losses


def test_the_fine_cut_is_tried_where_it_is_asked_for(tmp_path):
    conversions = candidates("tiny", AUTO.model_copy(update={"fine": True}))
    assert [conversion.name for conversion in conversions] == [
        "specialists S1A1E4",
        "coactivation S3A3E12",
        "coactivation S12A12E48",
    ]
    partial = ResumableOutput(tmp_path / "out", {}, resume=False)
    for conversion, loss in zip(conversions, (3.0, 2.9, 2.8), strict=True):
        partial.add_trial(conversion.name, loss)
    conversion, trials = choose(conversions, partial)
    assert (conversion.name, conversion.config.fine, len(trials)) == ("coactivation S12A12E48", True, 3)
    [named] = candidates("tiny", AUTO.model_copy(update={"partition": "coactivation", "fine": True}))
    assert named.plan == conversion.plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": None, "plan": "S3A3E8"}, "--fine asks for about 64 disjoint groups, --plan S3A3E8 for something"),
        ({"expert_width": 16}, "--expert-width 16 for something else"),
        ({"memory_factor": 0.5}, "needs experts that overlap"),
        ({"partition": "specialists"}, "--partition specialists for something else"),
    ],
)
def test_what_no_fine_cut_can_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        candidates("tiny", AUTO.model_copy(update={"fine": True} | changes))


@pytest.mark.parametrize(
    ("fine", "names"), [(False, ["S1A1E8", "S3A3E12"]), (True, ["S1A1E8", "S3A3E12", "S12A12E48"])]
)
def test_a_memory_budget_need_not_be_spent(fine, names):
    conversions = candidates("tiny", AUTO.model_copy(update={"memory_factor": 2.0, "fine": fine}))
    assert [str(conversion.plan) for conversion in conversions] == names
    assert [conversion.config.memory_factor for conversion in conversions] == [2.0] + [1.0] * (len(conversions) - 1)


@pytest.mark.parametrize(
    ("tokens", "window", "windows"),
    [(1_024, 256, 32), (16_384, 256, 32), (65_536, 256, 128), (1_000_000, 256, 128), (16_384, 4_096, 4)],
)
def test_a_trial_grows_with_the_calibration(tokens, window, windows):
    assert trial_windows(tokens, window) == windows


def test_finished_trials_are_not_repeated(tmp_path, monkeypatch):
    def stop(done, count, note):
        if not note.startswith("trying"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("tiny", tmp_path / "out", AUTO, progress=stop)
    kept = json.loads((tmp_path / "out.partial" / "state.json").read_text())["trials"]
    monkeypatch.setattr(choice, "trial", None)
    metrics = convert("tiny", tmp_path / "out", AUTO)
    assert {f"{t.partition} {t.plan}": t.held_out_loss for t in metrics.trials} == kept


def test_a_named_partition_or_one_that_fits_alone_needs_no_trial():
    assert len(candidates("tiny", QUICK)) == 1
    [smaller] = candidates("tiny", AUTO.model_copy(update={"active": 0.25, "memory_factor": 0.75}))
    assert smaller.config.partition == "specialists"
    with pytest.raises(InputError, match="1 calibration windows are too few"):
        candidates("tiny", AUTO.model_copy(update={"tokens": 16, "window": 16}))
    with pytest.raises(InputError, match="at most 1"):
        candidates("tiny", AUTO.model_copy(update={"active": 1.5}))


@torch.no_grad()
def test_logits_scale_in_every_family(family):
    model = small_model(family)
    tokens = torch.arange(30)[None]
    cap = getattr(model.config, "final_logit_softcapping", None)
    before = model(tokens).logits
    names = scale_logits(model, 0.5)
    assert set(names) <= dict(model.named_parameters()).keys()
    expected = before / 2 if cap is None else (before / cap).atanh().mul(cap / 2).div(cap).tanh() * cap
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-4)


NORMS = {
    "stablelm": StableLmConfig, "cohere": CohereConfig, "olmo": OlmoConfig,
}  # fmt: skip
"""Families whose final norm takes the mean off: with a bias, without one, and without any parameter."""


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_logits_scale_through_norms_that_take_the_mean_off(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(NORMS[name](**SMALL)).eval()
    for part, parameter in model.named_parameters():
        if "norm" in part:
            parameter.data += 0.2 * torch.randn_like(parameter)
    assert can_scale_logits(model) == (name != "olmo")
    if name == "olmo":
        return
    tokens = torch.arange(30)[None]
    before = model(tokens).logits
    assert len(scale_logits(model, 0.7)) == 1 + (name == "stablelm")
    torch.testing.assert_close(model(tokens).logits, 0.7 * before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_they_convert(name, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(NORMS[name](**SMALL)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(tmp_path / "dense")
    config = ConvertConfig(plan="S1A1E8", partition="coactivation:alternations=0", tokens=2_048, window=64,
                           held_out_tokens=256, device="cpu")  # fmt: skip
    found = convert(tmp_path / "dense", tmp_path / "out", config, force=True)
    assert (found.logit_factor == 1.0) or name != "olmo"


@pytest.mark.parametrize("dense_layers", [None, "0"])
def test_the_width_is_the_layers_not_the_configurations(tmp_path, dense_layers):
    """LFM2 narrows its FFNs by default: two thirds of what its configuration says, rounded up."""
    torch.manual_seed(0)
    layers = {"layer_types": ["conv", "full_attention", "conv"]}
    config = Lfm2Config(**SMALL | {"intermediate_size": 144} | layers, block_multiple_of=8)
    model = AutoModelForCausalLM.from_config(config)
    assert {layer.feed_forward.w2.in_features for layer in model.model.layers} == {96}
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(tmp_path / "dense")
    assert plans(str(tmp_path / "dense"), 0.5).intermediate_size == 96
    settings = ConvertConfig(plan="S4A4E8", partition="coactivation:alternations=0", recovery="none", tokens=2_048,
                             window=64, held_out_tokens=256, device="cpu", dense_layers=dense_layers)  # fmt: skip
    found = convert(tmp_path / "dense", tmp_path / "out", settings, force=True)
    assert found.perplexity == pytest.approx(found.perplexity_dense, rel=1e-3)  # all experts run
    assert moesaic.load(tmp_path / "out").model(torch.arange(8)[None]).logits.isfinite().all()


def test_fewer_tokens_than_experts_are_refused(tmp_path):
    few = {"window": 4, "held_out_tokens": 64, "plan": "S1A1E16", "partition": "specialists"}
    with pytest.raises(InputError, match="8 calibration tokens are too few for 15 experts"):
        convert("tiny", tmp_path / "out", ConvertConfig(tokens=8, **few))
    few["plan"] = "S1A1E4"
    convert("tiny", tmp_path / "out", ConvertConfig(tokens=4, **few), force=True)  # fewer than the ridge is judged by


def test_specialists_are_no_narrower_than_there_are_neurons():
    for active, memory, size in ((0.5, 1.0, 128), (0.95, 2.0, 2_048)):
        with pytest.raises(InputError, match="holds no specialists of multiples of 256"):
            specialists_plan(active, memory, size, 256)


@pytest.mark.parametrize("changes", [{"plan": "S1A1E4"}, {"expert_width": 96}])
def test_memory_that_a_given_shape_cannot_use_is_refused(changes):
    with pytest.raises(InputError, match=r"memory-factor|width follows from"):
        candidates("tiny", AUTO.model_copy(update={"active": None, "memory_factor": 4.0} | changes))


@torch.no_grad()
def test_confidence_is_the_best_factor_on_the_grid():
    [conversion] = candidates("tiny", QUICK.model_copy(update={"active": 0.5, "tokens": 4_096}))
    conversion.layerwise.load_embeddings_and_head()
    hidden = embed(conversion.layerwise, conversion.tokens).validation
    for index in range(len(conversion.layerwise.layers)):
        with conversion.layerwise.layer(index) as layer:
            hidden = conversion.layerwise.run(index, layer, hidden)
    weight = conversion.layerwise.model.base_model.norm.weight
    weight *= 1.5  # too sure of itself
    before = weight.clone()
    factor, tensors = fit_temperature(conversion.layerwise, conversion.tokens.validation_NL, hidden)
    assert torch.equal(weight, before)
    assert factor < 0.8
    [scaled] = tensors.values()
    torch.testing.assert_close(scaled, before * factor)

    def loss(value):
        weight.copy_(before * value)
        found = conversion.layerwise.token_losses(conversion.tokens.validation_NL, hidden).mean().item()
        weight.copy_(before)
        return found

    assert loss(factor) <= min(loss(factor - STEP), loss(factor + STEP)) + 1e-6


def test_the_scaled_norm_is_in_the_checkpoint(tmp_path):
    metrics = convert("tiny", tmp_path / "out", QUICK.model_copy(update={"plan": "S0A1E24", "tokens": 8_192}))
    assert metrics.logit_factor < 1
    model, _ = moesaic.load(tmp_path / "out")
    dense, _ = moesaic.load("tiny")
    torch.testing.assert_close(
        model.base_model.norm.weight, dense.base_model.norm.weight * metrics.logit_factor, rtol=1e-2, atol=1e-3
    )
