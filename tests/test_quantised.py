"""Dense, siblings and ours in llama.cpp's types: sizes, perplexities of the very files, and what nothing else beats."""

import json
import shutil
from dataclasses import replace

import gguf
import pytest
import torch
from transformers import AutoTokenizer

import moesaic
from conftest import QUICK, small_model
from moesaic import InputError, convert
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.comparison.llama_cpp import take_turns
from moesaic.comparison.quantised import compare_quantised, entries_of, on_front
from moesaic.formats import gguf_support
from moesaic.report.quantised import label_of, lines_of, write_quantised
from moesaic.results import QuantisedRow, Rate
from test_report import fake_llama_cpp  # noqa: F401  a fixture

RATE = Rate(tokens_per_s=1.0, dense_tokens_per_s=1.0, speedup=1.0)


def row(speed, perplexity, kind="dense", outtype="f16"):
    return QuantisedRow(
        kind=kind, model="a/b", plan="S1A1E4" if kind == "converted" else None, ffn_active=0.5, outtype=outtype,
        bytes=1, perplexity=perplexity, perplexity_ratio=1.0, decode=replace(RATE, tokens_per_s=speed), prefill=RATE,
        on_front=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 10), (2, 12), (3, 15)], [True, True, True]),
        ([(1, 10), (2, 9), (3, 15)], [False, True, True]),  # slower and worse
        ([(2, 10), (2, 9), (1, 9)], [False, True, False]),  # as fast and worse, as good and slower
        ([(2, 9), (2, 9)], [True, True]),  # equals do not beat each other
    ],
)
def test_what_nothing_beats_is_marked(points, front):
    assert [found.on_front for found in on_front([row(*point) for point in points])] == front


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "out"
    convert("tiny", folder, QUICK.model_copy(update={"plan": "S2A2E8"}))
    return folder


@pytest.fixture
def found(out, fake_llama_cpp, tmp_path):  # noqa: F811
    return compare_quantised(
        [out], fake_llama_cpp, siblings=["tiny"], outtypes=("f32", "q4_0"), window=64, max_tokens=256, prompt=8, new=4,
        rounds=2, scratch=tmp_path,
    )  # fmt: skip


def test_each_model_is_in_each_type(found, out, tmp_path):
    assert [(r.kind, r.outtype) for r in found.rows] == [
        (kind, outtype) for outtype in ("f32", "q4_0") for kind in ("dense", "sibling", "converted")
    ]
    names = [Checkpoint(folder).fingerprint()[:12] for folder in (tiny_folder(), tiny_folder(), out)]
    assert not list(tmp_path.glob("*.read"))
    for r in found.rows:
        number = {"dense": 0, "sibling": 1, "converted": 2}[r.kind]
        file = tmp_path / f"{number}-{r.kind}-{names[number]}-{r.outtype}.gguf"
        assert r.bytes == file.stat().st_size
        kinds = {t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
        assert r.outtype.upper() in kinds
        assert r.decode.speedup == (1.0 if r.kind == "dense" else 2.0)  # as the module in llama.cpp's place says
    dense, sibling, ours, *rounded = found.rows
    assert dense.perplexity == sibling.perplexity < ours.perplexity
    assert dense.perplexity_ratio == 1
    assert (ours.plan, ours.ffn_active) == ("S2A2E8", 0.5)
    model, tokenizer = moesaic.load(out, dtype=torch.float32)
    whole = moesaic.evaluate(model, tokenizer, window=64, max_tokens=256)
    assert ours.perplexity == pytest.approx(whole.perplexity, rel=1e-3)
    assert (found.tokens, found.data_sha256) == (whole.tokens, whole.data_sha256)
    assert all(r.perplexity != f.perplexity and r.bytes < f.bytes for r, f in zip(rounded, found.rows, strict=False))


def test_k_quants_are_made_of_dense_models_too(out, fake_llama_cpp, tmp_path, monkeypatch):  # noqa: F811
    def compare():
        return compare_quantised(
            [out], fake_llama_cpp, outtypes=("q4_k_m",), window=64, max_tokens=256, prompt=8, new=4, rounds=1,
            scratch=tmp_path / "files",
        )  # fmt: skip

    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "llama-quantize").write_text("#!/bin/sh\n[ $3 = Q4_K_M ] && /bin/cp $1 $2\n")
    (tmp_path / "llama-quantize").chmod(0o755)
    with pytest.raises(InputError, match=r"the width of experts, .* is no multiple"):
        compare()
    monkeypatch.setattr(gguf_support, "K_BLOCK", 8)
    found = compare()  # that command changes nothing, so these are f16's
    assert [(r.kind, r.outtype) for r in found.rows] == [("dense", "q4_k_m"), ("converted", "q4_k_m")]
    assert not list((tmp_path / "files").glob("*.quantised"))
    (tmp_path / "llama-quantize").unlink()
    shutil.rmtree(tmp_path / "files")
    with pytest.raises(InputError, match="llama-quantize, which is not on the PATH"):
        compare()
    assert not list((tmp_path / "files").glob("*")), "refused before anything is written"


def test_the_chart_has_a_line_for_each_model(found, tmp_path):
    assert [len(line.rows) for line in lines_of(found.rows)] == [2, 2, 2]
    assert label_of(found.rows[2]) == "S2A2E8, 50%"
    write_quantised(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_other_tokens_do_not_compare(out, tmp_path):
    small_model("qwen2").save_pretrained(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="has other tokens than 'tiny'"):
        entries_of([str(out)], None, [str(tmp_path / "other")])


def test_cpu_time_is_of_one_thread(tmp_path):
    with pytest.raises(InputError, match="of one thread, not of 2"):
        take_turns([], [1], tmp_path, new=1, rounds=1, threads=2, clock="cpu")


def test_from_the_command_line(run, out, fake_llama_cpp, tmp_path):  # noqa: F811
    common = ("benchmark", out, "--for", "llama.cpp", "--llama-cpp", fake_llama_cpp)
    code, text, _ = run(
        *common, "--outtype", "q8_0", "--max-tokens", 2048, "--prompt", 8, "--new", 4, "--rounds", 1,
        "--plot", tmp_path / "a.png", "--json",
    )  # fmt: skip
    assert (code, [r["kind"] for r in json.loads(text)["rows"]]) == (0, ["dense", "converted"])
    assert (tmp_path / "a.png").is_file()
    code, _, error = run(*common, "--select", "top-k:k=1")
    assert (code, "--select has no say in llama.cpp" in error) == (2, True)
    code, _, error = run("benchmark", out, "--for", "vllm")
    assert (code, "only llama.cpp is measured so" in error) == (2, True)
    code, _, error = run(*common, "--outtype", "q9_0")
    assert (code, "unknown outtype 'q9_0'" in error) == (2, True)
