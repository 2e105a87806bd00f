"""GGUF holds the tensors of a stock architecture, the tokenizer as llama.cpp has it, and nothing it cannot run.

That llama.cpp says what transformers says is in `test_engines.py`.
"""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import QUICK, small_model
from moesaic import InputError, Plan, WorkError, convert, export
from moesaic.checkpoint.single_file import ResumableFile
from moesaic.cli import app
from moesaic.formats import gguf_support
from moesaic.formats.gguf import writer as gguf_export
from moesaic.formats.gguf.vocabulary import adds, pre_tokenizer, scores, token_list
from moesaic.moe.modeling import moesaic_config


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(folders("qwen2"), out, QUICK.model_copy(update={"plan": "S4A2E6"}))
    return out


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize(
    ("outtype", "bound"), [("f32", 0), ("f16", 1e-3), ("bf16", 4e-3), ("q8_0", 1e-2), ("q4_0", 0.2)]
)
def test_the_file_holds_the_native_form(converted, tmp_path, outtype, bound):
    facts = export(converted, tmp_path / "model.gguf", "gguf", outtype=outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    fields, tensors = read(tmp_path / "model.gguf")
    assert (fields["general.architecture"], facts.architecture) == ("glm4moe", "glm4moe")
    assert (fields["glm4moe.expert_count"], fields["glm4moe.expert_used_count"]) == (2, 2)
    assert not fields["glm4moe.expert_weights_norm"]
    stock = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).model.layers[1]
    expected = {
        "blk.1.attn_q.weight": stock.self_attn.q_proj.weight,
        "blk.1.attn_q.bias": stock.self_attn.q_proj.bias,
        "blk.1.ffn_gate_inp.weight": stock.mlp.gate.weight,
        "blk.1.exp_probs_b.bias": stock.mlp.gate.e_score_correction_bias,
        "blk.1.ffn_up_exps.weight": stock.mlp.experts.gate_up_proj[:, 16:],
        "blk.1.ffn_down_exps.weight": stock.mlp.experts.down_proj,
        "blk.1.ffn_down_shexp.weight": stock.mlp.shared_experts.down_proj.weight,
        "blk.1.post_attention_norm.weight": stock.post_attention_layernorm.weight,
    }
    for name, tensor in expected.items():
        difference = np.linalg.norm(tensors[name] - tensor.detach().numpy())
        assert difference <= bound * np.linalg.norm(tensors[name]), name
    # 16 neurons are no whole block of 32
    assert facts.fallbacks == (3 if outtype in ("q8_0", "q4_0") else 0)


@pytest.mark.parametrize(
    ("family", "settings", "architecture"),
    [
        ("llama3-rope", {"plan": "S4A1E8", "partition": "specialists"}, "granitemoe"),
        ("granite", {"plan": "S4A1E8", "partition": "specialists"}, "granitemoe"),
        ("llama", {"plan": "S0A1E8", "partition": "specialists"}, "llama"),
        ("phi3", {"plan": "S4A2E8"}, "glm4moe"),
    ],
)
def test_the_architecture_follows_the_model(folders, tmp_path, family, settings, architecture):
    convert(folders(family), tmp_path / "out", QUICK.model_copy(update=settings))
    assert export(tmp_path / "out", tmp_path / "model.gguf", "gguf").architecture == architecture
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == architecture
    assert ("rope_freqs.weight" in tensors) == (family == "llama3-rope")
    if family == "granite":
        assert fields["granitemoe.residual_scale"] == 0.5


@pytest.mark.parametrize(
    ("family", "settings", "outtype", "reason"),
    [
        ("llama3-rope", {}, "f16", "adds a constant"),
        ("gemma3", {}, "f16", "GeGLU"),
        ("olmo2", {}, "f16", "norms after attention"),
        ("qwen2", {}, "q4_k_m", "width of experts, 12, is no multiple"),
        ("qwen2", {}, "q8", "Did you mean 'q8_0'"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(folders, tmp_path, family, settings, outtype, reason):
    convert(folders(family), tmp_path / "out", QUICK.model_copy(update={"plan": "S1A2E8"} | settings))
    with pytest.raises(InputError, match=reason):
        export(tmp_path / "out", tmp_path / "model.gguf", "gguf", outtype=outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16}, "beta_fast"),
        ({"rope_type": "dynamic", "factor": 4.0}, "'dynamic' is not written"),
    ],
)
def test_what_llama_cpp_lacks_of_a_rope_is_refused(rope, reason):
    working = moesaic_config(small_model("qwen2").config, Plan(1, 2, 8, 12), "linear")
    assert gguf_export.gguf_format(working, has_bias=True).name == "glm4_moe"
    working.rope_parameters = working.rope_parameters | rope
    with pytest.raises(InputError, match=reason):
        gguf_export.gguf_format(working, has_bias=True)


def test_k_quants_need_llama_quantize(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_support, "K_BLOCK", 16)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="llama-quantize, which is not on the PATH"):
        export(converted, tmp_path / "model.gguf", "gguf", outtype="q4_k_m")
    command = tmp_path / "llama-quantize"
    command.write_text("#!/bin/sh\n[ $3 = Q4_K_M ] && /bin/cp $1 $2\n")
    command.chmod(0o755)
    facts = export(converted, tmp_path / "model.gguf", "gguf", outtype="q4_k_m")
    kinds = [t.tensor_type for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert facts.fallbacks == kinds.count(gguf.GGMLQuantizationType.F16) > 20  # that command quantises nothing
    command.write_text("#!/bin/sh\necho no such type >&2; exit 1\n")
    with pytest.raises(WorkError, match="no such type"):
        export(converted, tmp_path / "other.gguf", "gguf", outtype="q4_k_m")
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "llama-quantize"}


def test_an_existing_file_is_kept_unless_told(converted, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        export(converted, path, "gguf")
    with pytest.raises(InputError, match="is no GGUF and is not replaced"):
        export(converted, path, "gguf", overwrite=True)
    assert path.read_text() == "mine"
    path.write_bytes(b"GGUF")
    result = CliRunner().invoke(
        app, ["export", str(converted), str(path), "--to", "gguf", "--outtype", "q8_0", "--overwrite", "--json"]
    )
    assert json.loads(result.stdout)["outtype"] == "q8_0"


def test_a_gguf_is_not_exported_onto_itself(converted, tmp_path, monkeypatch):
    export(converted, tmp_path / "m.gguf", outtype="f32")
    before = (tmp_path / "m.gguf").read_bytes()
    reader, _ = read(tmp_path / "m.gguf")
    assert reader["general.name"].endswith(" S4A2E6")
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in (tmp_path / "m.gguf", "~/m.gguf"):
        with pytest.raises(InputError, match="is the model that is read"):
            export(model, "~/m.gguf", outtype="q8_0", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == before


@pytest.mark.parametrize("out", ["x", "x.gguf"])
def test_a_model_that_is_called_as_unfinished_work_is_not_emptied(converted, tmp_path, out):
    source = shutil.copytree(converted, tmp_path / f"{out}.partial")
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(InputError, match="what is made beside it is the model that is read"):
        export(source, tmp_path / out, "moesaic" if out == "x" else "auto")
    assert sorted(path.name for path in source.iterdir()) == before


def test_an_unfinished_conversion_is_not_cleared_by_an_export(converted, tmp_path):
    partial = ResumableFile(tmp_path / "m.gguf", {"model": "another"}, resume=False)
    partial.add_trial("a", 1.0)
    with pytest.raises(InputError, match="holds an unfinished conversion"):
        export(converted, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf.partial" / "state.json").is_file()


def test_a_file_that_reads_back_otherwise_is_not_kept(converted, tmp_path, monkeypatch):
    numbers = iter(range(10_000))
    monkeypatch.setattr(gguf_export, "checksum", lambda data: next(numbers))
    with pytest.raises(WorkError, match="not what was written"):
        export(converted, tmp_path / "model.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def test_ways_to_cut_text_have_llama_cpps_names():
    byte_level = {"type": "ByteLevel", "use_regex": False}
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def sequence(*parts):
        return {"type": "Sequence", "pretokenizers": list(parts)}

    assert pre_tokenizer({"type": "ByteLevel", "use_regex": True}, False) == "gpt-2"
    assert pre_tokenizer(sequence(split(words + r"\p{N}" + rest), byte_level), False) == "qwen2"
    three = sequence(split(words + r"\p{N}{1,3}" + rest), byte_level)
    assert [pre_tokenizer(three, ignore_merges) for ignore_merges in (True, False)] == ["llama-bpe", "dbrx"]
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer(sequence(digits, {"type": "ByteLevel"}), False) == "smollm"
    for unknown in (
        sequence(split(r"\w+"), byte_level),
        {"type": "ByteLevel", "use_regex": True, "add_prefix_space": True},
        sequence(split(words + r"\p{N}" + rest), digits, byte_level),
    ):
        with pytest.raises(InputError, match="rules it knows by name"):
            pre_tokenizer(unknown, False)


@pytest.mark.parametrize(("template", "expected"), [
    (None, {"bos": False, "eos": False}),
    ("<s> $A", {"bos": True, "eos": False}),
    ("<s> $A </s>", {"bos": True, "eos": True}),
])  # fmt: skip
def test_whether_a_text_begins_with_bos_is_always_said(sentencepiece, template, expected):
    if template:
        ids = [(token, sentencepiece.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        sentencepiece.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    assert adds(sentencepiece) == expected


@pytest.fixture
def sentencepiece():
    """A tokenizer like Llama 2's, of 300 tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("☃", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = ["the first of the numbers that were there before the others came and went"] * 10
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, special_tokens=special[:3]))
    spec = json.loads(tokenizer.to_str())
    vocab = {token: i for i, token in enumerate(special)}
    for token in spec["model"]["vocab"]:
        vocab.setdefault(token, len(vocab))
    spec["model"]["vocab"] = vocab
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_sentencepiece_merges_become_scores(sentencepiece, tmp_path):
    sentencepiece.save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    gguf_export.write_vocabulary(writer, tmp_path, sentencepiece, 400)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "vocab.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    types = fields["tokenizer.ggml.token_type"]
    kinds = gguf.TokenType
    assert types[:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE]
    assert types[-1] == kinds.UNUSED
    tokens, found = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    merges = json.loads(sentencepiece.backend_tokenizer.to_str())["model"]["merges"]
    first, second = ("".join(merge) for merge in merges[:2])
    assert found[tokens.index(first)] == 0 > found[tokens.index(second)] == -1
    assert found[5] == -len(merges)


def test_scores_take_the_earliest_merge():
    assert scores(["a", "b", "ab", "abc"], [["a", "b"], ["ab", "c"], ["a", "bc"]]) == [-3, -3, 0, -1]


def test_unused_ids_are_marked(sentencepiece):
    tokens, types = token_list(sentencepiece, len(sentencepiece) + 2, sentencepiece=True)
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert types[-2:] == [gguf.TokenType.UNUSED] * 2
