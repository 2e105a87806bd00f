"""What a checkpoint holds is compared with what is read of it, and config.json is the truth; nothing is made up."""

import copy
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moesaic
from conftest import FAMILIES, QUICK, SMALL
from moesaic.checkpoint import sources
from moesaic.checkpoint.gguf_source import parts
from moesaic.checkpoint.reader import Checkpoint
from moesaic.conversion.convert import convert
from moesaic.conversion.plans import plans
from moesaic.errors import InputError, WorkError
from moesaic.evaluation.inspect import inspect
from moesaic.evaluation.perplexity import window_losses
from moesaic.formats.export import export
from moesaic.formats.fields import CONFIG_KEY, moesaic_fields
from moesaic.models.families import auto_class, empty
from moesaic.serving.loading import load
from test_moe_block import SIZES, STOCK
from vision import CONFIGS as VISION_CONFIGS

UP = "model.layers.1.mlp.up_proj.weight"
FORMATS = ("glm4_moe", "moesaic")


def changed_tensors(folder, change):
    """Change the tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def changed_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return path.parent


@pytest.fixture
def dense(folders, tmp_path):
    return shutil.copytree(folders("llama"), tmp_path / "dense")


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    """format -> a converted model, made once."""
    made = {}

    def get(format):
        if format not in made:
            made[format] = tmp_path_factory.mktemp(format) / "made"
            convert(folders("tied"), made[format], QUICK.model_copy(update={"format": format}))
        return made[format]

    return get


def drop(tensors):
    del tensors[UP]


def add(tensors):
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)


def scale(tensors):
    tensors[UP + "_scale"] = torch.ones(1)


def narrow(tensors):
    tensors[UP] = tensors[UP][:-8]


def as_bytes(tensors):
    tensors[UP] = tensors[UP].to(torch.int8)


def as_float8(tensors):
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)


DAMAGE = [
    (drop, rf"lacks 1 tensor: {UP}"), (add, "holds 1 tensor: model.layers.9.mlp.up_proj.weight, which"),
    (scale, "up_proj.weight_scale, which LlamaForCausalLM does not read"), (narrow, rf"{UP} is \[88, 32\]"),
    (as_bytes, "quantised weights .* of I8"), (as_float8, "quantised weights .* of F8_E4M3"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_every_door_refuses_what_is_not_read_as_it_lies_there(dense, tmp_path, damage, message):
    changed_tensors(dense, damage)
    for door in (load, lambda folder: convert(folder, tmp_path / "out", QUICK)):
        with pytest.raises(InputError, match=message):
            door(dense)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["drop", "add", "narrow"])
def test_converted_folders_are_compared_too(converted, tmp_path, format, damage):
    folder = shutil.copytree(converted(format), tmp_path / "made")
    shard = folder / "model-layer-00001.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if "experts" in name and "shared" not in name)
    changed = {
        "drop": {n: t for n, t in tensors.items() if n != name},
        "add": tensors | {name + "_scale": torch.ones(1)},
        "narrow": tensors | {name: tensors[name][..., :-4].contiguous()},
    }[damage]
    save_file(changed, shard, metadata={"format": "pt"})
    if damage == "drop":  # the index would say it first
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = {"drop": "lacks 1 tensor", "add": "_scale, which", "narrow": "config.json says"}[damage]
    for door in (load, inspect, lambda made: export(made, tmp_path / "other", "moesaic")):
        with pytest.raises(InputError, match=message):
            door(folder)


def test_old_checkpoints_rotary_frequencies_are_passed_over(dense):
    changed_tensors(dense, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(dense)


def test_a_tie_against_a_head_of_its_own_is_a_contradiction(folders, tmp_path):
    folder = shutil.copytree(folders("llama"), tmp_path / "dense")  # untied: the head is another one
    changed_json(folder / "config.json", tie_word_embeddings=True)
    for door in (load, lambda model: convert(model, tmp_path / "out", QUICK)):
        with pytest.raises(InputError, match=r"config\.json says tie_word_embeddings, but lm_head\.weight is not"):
            door(folder)
    changed_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(folder)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_configurations_of_quantised_weights_are_refused(dense, key):
    changed_json(dense / "config.json", **{key: {"bits": 4}})
    with pytest.raises(InputError, match=f"quantised weights .{key}"):
        Checkpoint(dense)


def test_other_tools_files_say_that_weights_are_quantised(dense):
    (dense / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"quantised weights .hf_quant_config\.json"):
        Checkpoint(dense)


def test_an_adapter_is_to_be_merged_first(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge the adapter first"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", ""])
def test_shards_elsewhere_are_not_read(dense, file):
    (dense / "model.safetensors").rename(dense / "a.safetensors")
    shutil.copy(dense / "a.safetensors", dense.parent / "secret.safetensors")
    weight_map = dict.fromkeys(load_file(dense / "a.safetensors"), "a.safetensors") | {UP: file}
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="which is not a file of that folder"):
        Checkpoint(dense)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_before_work(dense, tmp_path, value):
    changed_tensors(dense, lambda t: t[UP][3].__setitem__(5, value))
    for door in (load, lambda model: convert(model, tmp_path / "out", QUICK)):
        with pytest.raises(InputError, match=rf"{UP} holds 1 of 3,072 values that are NaN or infinite"):
            door(dense)
    assert not (tmp_path / "out.partial").exists()


def test_numbers_that_grow_too_large_on_the_way_are_named_by_layer(dense, tmp_path):
    def enlarge(tensors):
        for part in ("gate", "up", "down"):
            tensors[f"model.layers.1.mlp.{part}_proj.weight"] *= 1e20

    changed_tensors(dense, enlarge)
    with pytest.raises(WorkError, match=r"layer 1: .* NaN or infinite in float32"):
        convert(dense, tmp_path / "out", QUICK.model_copy(update={"recovery": "none"}))
    model, tokenizer = load(dense)
    with pytest.raises(WorkError, match=r"window 1 of .* logits are NaN or infinite in float32"):
        moesaic.evaluate(model, tokenizer, window=64, max_tokens=128)


CONFIGS = {
    "num_hidden_layers": 0, "num_attention_heads": 0, "head_dim": 0, "hidden_size": "big", "hidden_act": 5,
    "max_position_embeddings": None, "rope_parameters": "x", "intermediate_size": 10**15, "dtype": [1],
    "vocab_size": -1, "model_type": "nothing", "num_key_value_heads": 3.5,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_impossible_configurations_are_refused(dense, tmp_path, name):
    changed_json(dense / "config.json", **{name: CONFIGS[name]})
    for door in (load, lambda model: plans(str(model)), lambda model: convert(model, tmp_path / "out", QUICK)):
        with pytest.raises(InputError):
            door(dense)


def test_code_in_a_checkpoint_never_runs(dense, tmp_path):
    changed_json(dense / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    (dense / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="code of its own, which is never run"):
        load(dense)
    assert not (tmp_path / "ran").exists()


def test_only_what_a_stock_configuration_cannot_say_stands_beside_it(converted):
    checkpoint = Checkpoint(converted("glm4_moe"))
    own = checkpoint.config[CONFIG_KEY]
    assert not {"vocab_size", "rope_parameters", "max_position_embeddings", "eos_token_id", "rms_norm_eps"} & own.keys()
    ours = Checkpoint(converted("moesaic")).config
    assert {name: moesaic_fields(checkpoint)[name] for name in ours if name != "transformers_version"} == {
        name: value for name, value in ours.items() if name != "transformers_version"
    }


def test_an_edit_of_the_visible_configuration_counts_everywhere(converted, tmp_path):
    folder = shutil.copytree(converted("glm4_moe"), tmp_path / "made")
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 256,
            "partial_rotary_factor": 1.0}  # fmt: skip
    changed_json(folder / "config.json", rope_parameters=yarn, rope_scaling=yarn, max_position_embeddings=1_024,
                 eos_token_id=7)  # fmt: skip
    export(folder, tmp_path / "model.gguf")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    assert read.get_field("glm4moe.rope.scaling.type").contents() == "yarn"
    assert read.get_field("glm4moe.context_length").contents() == 1_024
    export(folder, tmp_path / "ours", "moesaic")
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (ours["rope_parameters"]["factor"], ours["eos_token_id"]) == (4.0, 7)
    tokens = torch.arange(100)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = window_losses(stock, tokens)
    assert torch.allclose(window_losses(load(folder, dtype=torch.float32)[0], tokens), expected, atol=0.02)


@pytest.mark.parametrize(
    ("name", "value"), [("n_routed_experts", 3), ("norm_topk_prob", True), ("moe_intermediate_size", 3),
                        ("routed_scaling_factor", 2.0), ("hidden_act", "gelu")]
)  # fmt: skip
def test_a_contradiction_is_refused(converted, tmp_path, name, value):
    folder = changed_json(shutil.copytree(converted("glm4_moe"), tmp_path / "made") / "config.json", **{name: value})
    for door in (load, inspect, lambda model: export(model, tmp_path / "other", "moesaic")):
        with pytest.raises(InputError, match=rf"contradicts itself: {name}|config\.json says"):
            door(folder)


def test_embeddings_resized_by_transformers_stay_whole(converted, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted("glm4_moe")), load(converted("glm4_moe"))[1]
    tokenizer.add_tokens(["<|tool|>", "<|call|>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    again, _ = load(tmp_path / "more")
    assert again.config.vocab_size == 1026 == len(again.get_input_embeddings().weight)
    assert moesaic.complete(again, tokenizer, "<|tool|> hello", max_new_tokens=1) is not None
    export(tmp_path / "more", tmp_path / "more.gguf")
    read = gguf.GGUFReader(tmp_path / "more.gguf")
    assert len(read.get_field("tokenizer.ggml.tokens").data) == 1026


def test_a_token_without_an_embedding_is_named(dense, tmp_path):
    tokenizer = load(dense)[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(dense)
    model, tokenizer = load(dense)
    (tmp_path / "text.txt").write_text("<|im_start|> where is the bread? " * 500)
    config = QUICK.model_copy(update={"calibration": (str(tmp_path / "text.txt"),)})
    for call in (
        lambda: moesaic.complete(model, tokenizer, "hello", chat=True, max_new_tokens=1),
        lambda: moesaic.evaluate(model, tokenizer, text=tmp_path / "text.txt", window=64),
        lambda: convert(dense, tmp_path / "out", config),
    ):
        with pytest.raises(InputError, match=r"the token '<\|im_start\|>' \(1024\), .* 1,024 rows"):
            call()
    convert(dense, tmp_path / "out", QUICK)  # text without it is fine


def split_gguf(folder, path, name, **parts_of):
    """Write a dense llama in `folder` as GGUF."""
    from moesaic.formats.gguf import dense as writer

    original = gguf.GGUFWriter
    writer.gguf.GGUFWriter = lambda *args: original(*args, **parts_of)
    try:
        writer.write_dense_gguf(folder, path / name, "f32")
    finally:
        writer.gguf.GGUFWriter = original


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


def test_a_split_gguf_is_joined_and_a_missing_part_named(folders, tmp_path, cache):
    split_gguf(folders("llama"), tmp_path, "whole.gguf")
    split_gguf(folders("llama"), tmp_path, "part.gguf", split_max_tensors=9)
    first = tmp_path / "part-00001-of-00004.gguf"
    assert len(parts(first)) == 4
    whole, joined = (Checkpoint(sources.resolve(str(path))) for path in (tmp_path / "whole.gguf", first))
    assert whole.headers.keys() == joined.headers.keys()
    assert all(torch.equal(whole.read(name), joined.read(name)) for name in whole.headers)
    (tmp_path / "part-00003-of-00004.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(InputError, match=r"one of 4 files, and part-00003-of-00004\.gguf is missing"):
        sources.resolve(str(first))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999])
def test_a_gguf_cut_short_is_refused(folders, tmp_path, cache, share):
    split_gguf(folders("llama"), tmp_path, "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"damaged or cut short|is not a GGUF file"):
        sources.resolve(str(tmp_path / "cut.gguf"))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_llama_3s_rope_survives_gguf_and_unknown_ones_are_refused(folders, tmp_path, cache):
    folder = shutil.copytree(folders("llama3-rope"), tmp_path / "dense")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    changed_json(folder / "config.json", rope_parameters=rope | {"original_max_position_embeddings": 8_192})
    split_gguf(folder, tmp_path, "llama3.gguf")
    read = json.loads((sources.resolve(str(tmp_path / "llama3.gguf")) / "config.json").read_text())["rope_parameters"]
    assert {name: read[name] for name in ("rope_type", "factor", "original_max_position_embeddings")} == {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8_192
    }  # fmt: skip
    split_gguf(folders("llama3-rope"), tmp_path, "other.gguf")  # of 64 positions, which GGUF does not say
    with pytest.raises(InputError, match="rotary positions of this GGUF are scaled"):
        sources.resolve(str(tmp_path / "other.gguf"))


def test_a_gguf_with_more_than_is_read_is_refused(folders, tmp_path, cache):
    split_gguf(folders("llama"), tmp_path, "whole.gguf")
    whole = gguf.GGUFReader(tmp_path / "whole.gguf")
    from moesaic.checkpoint import gguf_source

    extra = type(whole.tensors[0])(
        "blk.0.attn_q.bias", gguf.GGMLQuantizationType.F32, np.array([32]), 32, 128, 0, np.ones(32, np.float32), None
    )
    whole.tensors.append(extra)
    gguf_source.join([whole], tmp_path / "more.gguf")
    with pytest.raises(InputError, match=r"holds [\d,]+ weights, but the llama model"):
        sources.resolve(str(tmp_path / "more.gguf"))


def configs():
    """A small configuration of every family: dense, Mixtures of Experts, vision-language models."""
    yield from ((name, made(**(SMALL | fields))) for name, (made, fields) in FAMILIES.items())
    yield from ((name, made(**(SIZES | fields))) for name, (made, fields, *_) in STOCK.items())
    yield from ((name, make()) for name, make in VISION_CONFIGS.items())


@pytest.mark.parametrize(
    ("name", "config"), [pytest.param(*pair, id=f"{n}-{pair[0]}") for n, pair in enumerate(configs())]
)
def test_a_model_without_weights_has_all_else(name, config):
    """Buffers, shapes and ties are those of a model that was initialised."""
    made = empty(copy.deepcopy(config))
    assert all(parameter.is_meta for parameter in made.parameters())
    drawn = auto_class(config).from_config(copy.deepcopy(config))
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (made, drawn)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(dict(made.named_buffers()), dict(drawn.named_buffers()), rtol=0, atol=0)


def test_generating_leaves_the_callers_random_numbers_alone():
    model, tokenizer = load("tiny")
    state = torch.get_rng_state()
    first, again = (moesaic.complete(model, tokenizer, "The first", temperature=1.0, seed=3) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
