"""Layer-by-layer running equals transformers' own forward, for every family, single file or shards."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

from conftest import QUICK, SMALL, small_model
from moesaic import InputError, convert, load, plans
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import INDEX, Checkpoint
from moesaic.models.layerwise import LayerwiseModel

CPU = torch.device("cpu")


@torch.no_grad()
def run_all(stream, tokens):
    stream.load_embeddings_and_head()
    hidden = stream.embed(tokens)
    for index in range(len(stream.layers)):
        with stream.layer(index) as layer:
            hidden = stream.run(index, layer, hidden)
        assert all(p.is_meta for p in layer.parameters())  # its memory is released
    return stream.token_losses(tokens, hidden)


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_streamed_losses_equal_transformers(folders, family, shards):
    folder = folders(family, max_shard_size=shards)
    tokens = torch.randint(2, 1024, (3, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, -1)
    losses = run_all(LayerwiseModel(folder, torch.float32, CPU), tokens)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


TEXT = {name: SMALL[name] for name in SMALL if name != "initializer_range"} | {"head_dim": 16}
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
WITH_IMAGES = {
    "llava": lambda: LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION)),
    "gemma3": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, sliding_window=16), vision_config=SiglipVisionConfig(**VISION)
    ),
}


ALONE = QUICK.model_copy(update={"recovery": "none", "plan": "S4A4E8", "text_only": True})


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_text_tower_of_a_vision_language_model_streams_too(name, tmp_path):
    """Its tensors are on disk under older names; the model around the tower is transformers' own."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(WITH_IMAGES[name]()).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(tmp_path)
    tokens = torch.randint(2, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, -1)
    for alone in (True, False):
        stream = LayerwiseModel(tmp_path, torch.float32, CPU, text_only=alone)
        torch.testing.assert_close(run_all(stream, tokens), expected)
    assert plans(str(tmp_path)).intermediate_size == SMALL["intermediate_size"]
    text = convert(tmp_path, tmp_path / "out", ALONE)
    with torch.no_grad():  # all experts on: what is written is the text part, under a text model's names
        assert torch.allclose(load(tmp_path / "out").model(tokens).logits[:, :-1], logits, atol=2e-3)
    assert text.dense_parameters < sum(p.numel() for p in model.parameters())


def test_a_vision_language_model_whose_text_part_is_no_model_of_its_own_is_refused(tmp_path):
    config = Qwen2VLConfig(
        text_config=TEXT, vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no model of its text part alone"):
        LayerwiseModel(tmp_path, torch.float32, CPU, text_only=True)


def test_other_architectures_are_refused_with_what_was_found(tmp_path):
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(InputError, match=r"not one stack of decoder layers.*found wte, wpe"):
        LayerwiseModel(tmp_path / "gpt2", torch.float32, CPU)
    moe = MixtralConfig(
        **small, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2
    )
    AutoModelForCausalLM.from_config(moe).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(InputError, match=r"no dense gated FFN.*MixtralSparseMoeBlock.*Missing"):
        LayerwiseModel(tmp_path / "mixtral", torch.float32, CPU)
    llama = small_model("llama").config
    llama.mlp_bias = True
    AutoModelForCausalLM.from_config(llama).save_pretrained(tmp_path / "bias")
    with pytest.raises(InputError, match="bias in gate_proj, up_proj, down_proj"):
        LayerwiseModel(tmp_path / "bias", torch.float32, CPU)


def test_damaged_folders_are_refused(tmp_path, folders):
    with pytest.raises(InputError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no safetensors weights"):
        Checkpoint(tmp_path)
    whole = (folders("llama") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    with pytest.raises(InputError, match=r"lacks missing\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {}}))
    with pytest.raises(InputError, match="quantised"):
        Checkpoint(tmp_path)


def test_the_fingerprint_sees_weights_and_config(tmp_path, folders):
    first = Checkpoint(folders("llama")).fingerprint()
    assert first == Checkpoint(folders("llama")).fingerprint()
    assert first != Checkpoint(folders("qwen2")).fingerprint()
