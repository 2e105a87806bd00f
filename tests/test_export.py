"""A native form says what the converted model says, goes back bit by bit, and is refused with the reason otherwise."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from conftest import QUICK, SMALL, small_model
from moesaic import InputError, WorkError, convert, evaluate, export
from moesaic.export import check
from moesaic.models.builtin import tiny_folder
from moesaic.models.converted import Converted
from moesaic.models.native import glm4_moe
from moesaic.models.working import working_config

NATIVE = ["llama", "llama3-rope", "mistral", "qwen2", "qwen3", "phi3", "tied"]
SHORT = {"max_tokens": 256, "window": 64}
PLANS = {"coactivation": "S1A2E8", "specialists": "S1A1E4"}


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    """(family, partition) -> a converted model's folder, made when first asked for."""
    made = {}

    def get(family, partition="specialists"):
        if (family, partition) not in made:
            out = tmp_path_factory.mktemp(family) / partition
            convert(folders(family), out, QUICK.model_copy(update={"partition": partition, "plan": PLANS[partition]}))
            made[family, partition] = out
        return made[family, partition]

    return get


@pytest.mark.parametrize("partition", PLANS)
@pytest.mark.parametrize("family", NATIVE)
def test_stock_transformers_says_the_same_and_the_way_back_is_exact(converted, family, partition, tmp_path):
    source = converted(family, partition)
    facts = export(source, tmp_path / "native")
    assert facts["median_difference"] < 0.01
    assert facts["agreement"] > 0.95
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(stock).__name__ == "Glm4MoeForCausalLM"
    assert not type(stock).__module__.startswith("moesaic")
    export(tmp_path / "native", tmp_path / "back", "moesaic")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    before = dict(Converted(source).tensors())
    for folder in ("native", "back"):
        after = dict(Converted(tmp_path / folder).tensors())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


@torch.no_grad()
def test_the_difference_shrinks_with_the_routers_scale(converted, tmp_path, monkeypatch):
    tokens = torch.arange(40)[None]
    model, _ = moesaic.load(converted("qwen2", "coactivation"))
    expected = model(tokens).logits
    differences = []
    for scale in (2.0**-6, 2.0**-10, 2.0**-14):
        monkeypatch.setattr(glm4_moe, "ROUTER_SCALE", scale)
        export(converted("qwen2", "coactivation"), tmp_path / str(scale))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / str(scale))
        differences.append((stock(tokens).logits - expected).norm() / expected.norm())
    assert differences[0] > 8 * differences[1] > 64 * differences[2]


def test_a_native_form_loads_as_the_working_form(converted, tmp_path):
    export(converted("tied"), tmp_path / "native")
    model, tokenizer = moesaic.load(tmp_path / "native")
    own, _ = moesaic.load(converted("tied"))
    assert type(model) is type(own)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert evaluate(model, tokenizer, **SHORT)["perplexity"] == evaluate(own, tokenizer, **SHORT)["perplexity"]
    assert moesaic.inspect(tmp_path / "native")["moe"] == moesaic.inspect(converted("tied"))["moe"]


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gemma2", {}, "GeGLU"),
        ("gemma3", {}, "GeGLU"),
        ("olmo2", {}, "norms after attention"),
        ("granite", {}, "multipliers"),
        ("llama", {"router": "representative"}, "router is linear"),
        ("llama", {"partition": "static", "plan": "S2A1E8"}, "no routed experts"),
        ("llama", {"plan": "S0A2E8"}, "needs a shared expert"),
    ],
)
def test_what_it_cannot_say_is_refused_before_anything_is_written(folders, tmp_path, family, settings, reason):
    convert(folders(family), tmp_path / "out", QUICK.model_copy(update={"plan": "S1A2E8"} | settings))
    with pytest.raises(InputError, match=reason):
        export(tmp_path / "out", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 64}, "sliding window"),
        ("llama", {"attention_bias": True}, "bias in o_proj"),
        ("llama", {"hidden_act": "gelu"}, "SiLU"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_configurations_that_it_cannot_say(family, change, reason):
    working = working_config(small_model(family).config, moesaic.Plan(1, 2, 8, 12), "linear")
    glm4_moe.check(working)
    for name, value in change.items():
        setattr(working, name, value)
    with pytest.raises(InputError, match=reason):
        glm4_moe.check(working)


def test_a_window_as_long_as_the_model_reaches_is_none():
    working = working_config(small_model("mistral").config, moesaic.Plan(1, 2, 8, 12), "linear")
    working.sliding_window = SMALL["max_position_embeddings"]
    glm4_moe.check(working)


def test_a_bad_export_leaves_nothing_behind(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TOLERANCE", -1.0)
    with pytest.raises(WorkError, match="is not the converted one"):
        export(converted("llama"), tmp_path / "native")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_goes_on(converted, tmp_path):
    def stop(done, count, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(converted("llama"), tmp_path / "native", progress=stop)
    assert len(list(tmp_path.glob("native.partial/model-layer-*"))) == 2
    export(converted("llama"), tmp_path / "native")
    export(converted("llama"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        export(converted("qwen2"), tmp_path / "other", progress=stop)
    with pytest.raises(InputError, match="unfinished work with another model"):
        export(converted("llama"), tmp_path / "other")
    export(converted("llama"), tmp_path / "other", resume=False)
    one, other = (dict(Converted(tmp_path / name).tensors()) for name in ("native", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_only_converted_models_and_known_forms(converted, tmp_path):
    with pytest.raises(InputError, match="moesaic did not make"):
        export(tiny_folder(), tmp_path / "native")
    with pytest.raises(InputError, match="Did you mean 'glm4-moe'"):
        export(converted("llama"), tmp_path / "native", "glm4")
    (tmp_path / "native").mkdir()
    with pytest.raises(InputError, match="exists"):
        export(converted("llama"), tmp_path / "native")


def test_export_from_the_command_line(converted, tmp_path, capsys):
    from typer.testing import CliRunner

    from moesaic.cli import app

    result = CliRunner().invoke(app, ["export", str(converted("qwen3")), str(tmp_path / "native"), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["form"] == "glm4_moe"
    assert "vllm serve native" in (tmp_path / "native" / "README.md").read_text()
