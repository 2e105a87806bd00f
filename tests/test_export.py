"""A stock architecture says what the converted model says, goes back bit by bit, or is refused with the reason."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from conftest import QUICK, SMALL, small_model
from moesaic import InputError, WorkError, convert, evaluate, export, registry
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.formats import verify as check
from moesaic.formats.architectures import _decoder
from moesaic.formats.converted import Converted
from moesaic.moe.modeling import moesaic_config

pipeline = sys.modules["moesaic.conversion.convert"]
CELLS = {
    "glm4_moe": ["llama", "llama3-rope", "mistral", "qwen2", "qwen3", "phi3", "tied"],
    "qwen2_moe": ["llama", "qwen2", "phi3", "tied"],
    "granitemoeshared": ["llama", "llama3-rope", "granite"],
    "mixtral": ["llama", "mistral", "phi3"],
    "flex_olmo": ["olmo2"],
}
GLM4_MOE = registry.build("format", "glm4_moe")
SHORT = {"max_tokens": 256, "window": 64}
METHODS = {
    "coactivation": {"plan": "S4A2E8"},
    "specialists": {"plan": "S4A1E8"},
    "no-bias": {"plan": "S4A2E8", "router": "linear:intercept=False"},
    "top-1": {"plan": "S0A1E8", "partition": "specialists"},
}


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    """(family, method) -> a converted model's folder in moesaic's own format, made when first asked for."""
    made = {}

    def get(family, method="specialists"):
        if (family, method) not in made:
            out = tmp_path_factory.mktemp(family) / method
            settings = {"format": "moesaic"} | METHODS[method]
            if method == "specialists":
                settings["partition"] = method
            convert(folders(family), out, QUICK.model_copy(update=settings))
            made[family, method] = out
        return made[family, method]

    return get


def same_tensors(one, other):
    one, other = dict(Converted(one).tensors()), dict(Converted(other).tensors())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], t) and one[n].dtype == t.dtype for n, t in other.items())


@pytest.mark.parametrize(
    ("format", "family", "method"),
    [
        (format, family, method)
        for format, families in CELLS.items()
        for family in families
        for method in ("coactivation" if format == "glm4_moe" else "no-bias", "specialists")
    ]
    + [("mixtral", "llama", "top-1"), ("flex_olmo", "olmo2", "top-1")],
)
def test_stock_transformers_says_the_same_and_the_way_back_is_exact(converted, format, family, method, tmp_path):
    source = converted(family, method)
    facts = export(source, tmp_path / "stock", format)
    assert facts.target == format
    assert facts.median_difference < 0.01
    assert facts.agreement > 0.95
    assert facts.max_abs_logit_error >= 0
    if method in ("specialists", "top-1") and format in ("granitemoeshared", "mixtral", "flex_olmo"):
        assert facts.median_difference < 1e-4  # the one gate is exactly 1
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert stock.config.model_type == format
    assert not type(stock).__module__.startswith("moesaic")
    export(tmp_path / "stock", tmp_path / "back", "moesaic")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    same_tensors(tmp_path / "stock", source)
    same_tensors(tmp_path / "back", source)


@pytest.mark.parametrize(
    ("family", "method", "format"),
    [
        ("qwen2", "coactivation", "glm4_moe"),
        ("granite", "specialists", "granitemoeshared"),
        ("olmo2", "specialists", "flex_olmo"),
        ("llama", "top-1", "mixtral"),
    ],
)
def test_convert_writes_the_stock_architecture_that_export_would(folders, converted, tmp_path, family, method, format):
    config = QUICK.model_copy(
        update=METHODS[method] | ({"partition": "specialists"} if method == "specialists" else {})
    )
    metrics = convert(folders(family), tmp_path / "out", config)
    assert metrics.format == format
    assert metrics.format_reason == ""
    assert metrics.check.median_difference < 0.01
    assert metrics.to_dict() == json.loads((tmp_path / "out" / "metrics.json").read_text())
    same_tensors(tmp_path / "out", converted(family, method))
    assert "stock transformers gave" in (tmp_path / "out" / "README.md").read_text()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.model_type == format
    parameters = sum(p.numel() for p in stock.parameters())
    assert metrics.total_parameters == pytest.approx(parameters, rel=1e-3)  # but for selection biases


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gemma3", {}, "no stock"),
        ("olmo2", {}, "several active experts would run a copy"),
        ("llama", {"router": "representative"}, "router is linear"),
        ("qwen2", {"plan": "S0A2E8"}, "needs a shared expert"),
    ],
)
def test_what_no_engine_has_stays_in_the_working_form_and_says_why(folders, tmp_path, family, settings, reason):
    metrics = convert(folders(family), tmp_path / "out", QUICK.model_copy(update={"plan": "S1A2E8"} | settings))
    assert metrics.format == "moesaic"
    assert reason in metrics.format_reason
    with pytest.raises(InputError, match=reason):
        export(tmp_path / "out", tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_native_form_that_fails_its_check_becomes_the_working_form(folders, converted, tmp_path, monkeypatch):
    real = check.logits

    def spoilt(model, tokens_NL):
        stock = not type(model).__module__.startswith("moesaic")
        return real(model, tokens_NL).roll(1, -1) if stock else real(model, tokens_NL)

    monkeypatch.setattr(check, "logits", spoilt)
    metrics = convert(folders("qwen2"), tmp_path / "out", QUICK.model_copy(update=METHODS["coactivation"]))
    assert metrics.format == "moesaic"
    assert "is not the converted one" in metrics.format_reason
    assert "check" not in metrics.to_dict()
    same_tensors(tmp_path / "out", converted("qwen2", "coactivation"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_native_form_that_fails_and_cannot_be_written_otherwise_is_found_again(folders, tmp_path, monkeypatch):
    config = QUICK.model_copy(update=METHODS["coactivation"])
    with monkeypatch.context() as patch:
        patch.setattr(check, "TOLERANCE", -1.0)
        patch.setattr(pipeline, "rewrite", Mock(side_effect=WorkError("the disk is full")))
        with pytest.raises(WorkError, match="the disk is full"):
            convert(folders("qwen2"), tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.setattr(pipeline, "convert_layer", None)  # nothing is converted again
    assert convert(folders("qwen2"), tmp_path / "out", config).format == "glm4_moe"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rope_that_was_forgotten_is_seen(converted, tmp_path, monkeypatch):
    real = _decoder.common_config

    def forgetful(*args):
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        return real(*args) | {"rope_parameters": rope, "rope_scaling": None}

    monkeypatch.setattr(_decoder, "common_config", forgetful)
    with pytest.raises(WorkError, match="is not the converted one"):
        export(converted("llama3-rope"), tmp_path / "stock")


def test_of_a_large_model_the_first_layers_are_checked(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "free_memory", lambda device: 0)
    assert export(converted("qwen2"), tmp_path / "stock").layers == 2 < 3


@torch.no_grad()
def test_the_difference_shrinks_with_the_routers_scale(converted, tmp_path, monkeypatch):
    tokens = torch.arange(40)[None]
    model, _ = moesaic.load(converted("qwen2", "coactivation"))
    expected = model(tokens).logits
    differences = []
    for scale in (2.0**-6, 2.0**-10, 2.0**-14):
        monkeypatch.setattr(_decoder, "ROUTER_SCALE", scale)
        export(converted("qwen2", "coactivation"), tmp_path / str(scale))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / str(scale))
        differences.append((stock(tokens).logits - expected).norm() / expected.norm())
    assert differences[0] > 8 * differences[1] > 64 * differences[2]


def test_a_native_form_loads_as_the_working_form(converted, tmp_path):
    export(converted("tied"), tmp_path / "stock")
    model, tokenizer = moesaic.load(tmp_path / "stock")
    own, _ = moesaic.load(converted("tied"))
    assert type(model) is type(own)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert evaluate(model, tokenizer, **SHORT).perplexity == evaluate(own, tokenizer, **SHORT).perplexity
    assert moesaic.inspect(tmp_path / "stock").moe == moesaic.inspect(converted("tied")).moe


@torch.no_grad()
def test_what_was_trained_in_a_native_form_comes_back_or_is_refused(converted, tmp_path):
    for family, format in (("tied", "glm4_moe"), ("olmo2", "flex_olmo")):
        export(converted(family), tmp_path / family, format)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        stock.lm_head.weight.mul_(3)
        stock.generation_config.eos_token_id = [1, 7, 9]
        stock.save_pretrained(tmp_path / family)
        model, _ = moesaic.load(tmp_path / family)
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=1e-2, atol=1e-2)
        assert model.generation_config.eos_token_id == [1, 7, 9]
    stock.model.layers[1].mlp.experts.down_proj[2].mul_(2)  # and with it a copy of the shared expert
    stock.save_pretrained(tmp_path / "olmo2")
    with pytest.raises(InputError, match=r"layers\.1\..*was changed since moesaic wrote it"):
        moesaic.load(tmp_path / "olmo2")


def test_a_card_names_the_engines_that_run_this_model(converted, tmp_path):
    cards = {}
    for family, method, format in [
        ("llama3-rope", "coactivation", "glm4_moe"), ("llama", "specialists", "glm4_moe"),
        ("mistral", "top-1", "mixtral"), ("llama", "top-1", "mixtral"), ("olmo2", "specialists", "flex_olmo"),
    ]:  # fmt: skip
        out = tmp_path / f"{family}-{method}"
        export(converted(family, method), out, format)
        cards[out.name] = (out / "README.md").read_text()
    mlx = {name for name, card in cards.items() if "mlx_lm" in card}
    assert mlx == {"llama-specialists", "llama-top-1"}
    assert {name for name, card in cards.items() if "--format gguf" in card} == {*mlx, "mistral-top-1"}
    assert "--disable-shared-experts-fusion" in cards["llama-specialists"]  # four shared ones


def test_types_are_of_gguf_and_missing_files_are_named_first(converted, tmp_path):
    with pytest.raises(InputError, match="--outtype q8_0 is a type of GGUF"):
        export(converted("llama"), tmp_path / "stock", outtype="q8_0")
    export(converted("llama"), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").is_file()
    model, tokenizer = moesaic.load(converted("llama"))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=r"has no moesaic\.yaml; copy it"):
        export(tmp_path / "saved", tmp_path / "stock")
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "saved"}


@pytest.mark.parametrize(
    ("format", "family", "settings", "reason"),
    [
        ("glm4_moe", "gemma2", {}, "GeGLU"),
        ("glm4_moe", "olmo2", {}, "flex_olmo"),
        ("glm4_moe", "granite", {}, "granitemoeshared"),
        ("glm4_moe", "llama", {"partition": "static", "plan": "S2A1E8"}, "no routed experts"),
        ("glm4_moe", "llama", {"plan": "S0A2E8"}, "needs a shared expert"),
        ("qwen2_moe", "qwen3", {}, "not for qwen3"),
        ("qwen2_moe", "mistral", {}, "heads are of 16 dimensions, the model's of 24"),
        ("qwen2_moe", "llama", {}, "7 routed experts exactly only"),
        ("qwen2_moe", "llama", {"plan": "S4A2E8"}, "constant to each expert"),
        ("granitemoeshared", "llama", {"plan": "S1A3E8"}, "3 active experts exactly only"),
        ("mixtral", "qwen2", {}, "not for qwen2"),
        ("flex_olmo", "llama", {}, "not for llama"),
    ],
)
def test_what_a_form_cannot_say_is_refused_before_anything_is_written(
    folders, tmp_path, format, family, settings, reason
):
    config = QUICK.model_copy(update={"plan": "S1A2E8", "format": "moesaic"} | settings)
    with pytest.raises(InputError, match=reason):
        convert(folders(family), tmp_path / "out", config.model_copy(update={"format": format}))
    convert(folders(family), tmp_path / "out", config)
    with pytest.raises(InputError, match=reason):
        export(tmp_path / "out", tmp_path / "stock", format)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 64}, "sliding window"),
        ("llama", {"attention_bias": True}, "bias in o_proj"),
        ("llama", {"hidden_act": "gelu"}, "SiLU"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ],
)
def test_configurations_that_it_cannot_say(family, change, reason):
    config = moesaic_config(small_model(family).config, moesaic.Plan(1, 2, 8, 12), "linear")
    GLM4_MOE.check(config, has_bias=False)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=reason):
        GLM4_MOE.check(config, has_bias=False)


def test_forms_that_turn_whole_heads_refuse_models_that_turn_parts():
    config = moesaic_config(small_model("phi3").config, moesaic.Plan(0, 1, 8, 12), "linear")
    mixtral = registry.build("format", "mixtral")
    mixtral.check(config, has_bias=False)
    config.rope_parameters = config.rope_parameters | {"partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match="turns whole heads"):
        mixtral.check(config, has_bias=False)


def test_a_window_as_long_as_the_model_reaches_is_none():
    config = moesaic_config(small_model("mistral").config, moesaic.Plan(1, 2, 8, 12), "linear")
    config.sliding_window = SMALL["max_position_embeddings"]
    GLM4_MOE.check(config, has_bias=False)


def test_a_bad_export_leaves_nothing_behind(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TOLERANCE", -1.0)
    with pytest.raises(WorkError, match="is not the converted one"):
        export(converted("llama"), tmp_path / "stock")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_goes_on(converted, tmp_path):
    def stop(done, count, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(converted("llama"), tmp_path / "stock", progress=stop)
    assert len(list(tmp_path.glob("stock.partial/model-layer-*"))) == 2
    export(converted("llama"), tmp_path / "stock")
    export(converted("llama"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        export(converted("qwen2"), tmp_path / "other", progress=stop)
    with pytest.raises(InputError, match="unfinished work with another model"):
        export(converted("llama"), tmp_path / "other")
    export(converted("llama"), tmp_path / "other", resume=False)
    one, other = (dict(Converted(tmp_path / name).tensors()) for name in ("stock", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_only_converted_models_and_known_forms(converted, tmp_path):
    with pytest.raises(InputError, match="moesaic did not make"):
        export(tiny_folder(), tmp_path / "stock")
    with pytest.raises(InputError, match="Did you mean 'glm4-moe'"):
        export(converted("llama"), tmp_path / "stock", "glm4")
    (tmp_path / "stock").mkdir()
    with pytest.raises(InputError, match="exists"):
        export(converted("llama"), tmp_path / "stock")


def test_export_from_the_command_line(converted, tmp_path, capsys):
    from typer.testing import CliRunner

    from moesaic.cli import app

    result = CliRunner().invoke(app, ["export", str(converted("qwen3")), str(tmp_path / "stock"), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["target"] == "glm4_moe"
    assert "vllm serve stock" in (tmp_path / "stock" / "README.md").read_text()
