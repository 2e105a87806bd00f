"""Smaller dense siblings: their line's mathematics, bytes in place of tokens, resuming, table and verdict, errors."""

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import moesaic
from conftest import save_smaller
from moesaic import InputError
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.comparison.frontier import frontier
from moesaic.comparison.line import Dot, line_at, place_row, same_tokens, verdict, verdicts
from moesaic.comparison.rows import Measurement, read_frontier, summarise
from moesaic.evaluation.cost import active_weights
from moesaic.evaluation.perplexity import perplexity, scored_text
from moesaic.evaluation.text_bytes import text_bytes
from moesaic.models.tokenizer import decoded
from moesaic.report.frontier import SIBLING
from moesaic.report.frontier_page import write_frontier_page
from moesaic.report.frontier_plot import draw_frontier
from moesaic.results import EvaluationResult, FrontierRow, FrontierSibling
from moesaic.serving.server.text import TextStream

MEASUREMENT = Measurement(tokens=2_048, max_tokens=4_096, speed=False)


# the line


def test_between_two_points_the_line_is_the_closed_form():
    a = math.log(32.0 / 13.5) / math.log(3.0)
    for x in (1.0, 1.3, 2.0, 3.0, 4.5):
        found = line_at([Dot(3.0, 32.0)], 13.5, x)
        assert found.perplexity == pytest.approx(13.5 * x**a)
        assert found.extrapolated == (x > 3)


dots = st.lists(st.builds(Dot, st.floats(1.01, 20), st.floats(10.01, 500)), min_size=1, max_size=5)


@given(dots=dots, x=st.floats(0.3, 40))
def test_the_line_goes_through_every_sibling_and_flags_what_is_beyond(dots, x):
    best = {dot.x: min(d.perplexity for d in dots if d.x == dot.x) for dot in dots}
    for at, value in best.items():
        assert line_at(dots, 10.0, at) == (pytest.approx(value), False)
    assert line_at(dots, 10.0, x).extrapolated == (x > max(best))
    assert line_at(dots[::-1], 10.0, x) == line_at(dots, 10.0, x)
    if x <= 1:
        assert line_at(dots, 10.0, x) == (10.0, False)


@given(
    steps=st.lists(st.tuples(st.floats(0.01, 2), st.floats(0.001, 2)), min_size=1, max_size=5),
    pair=st.tuples(st.floats(1, 60), st.floats(1, 60)),
)
def test_where_smaller_is_worse_the_line_rises(steps, pair):
    dots, x, value = [], 1.0, 10.0
    for wider, worse in steps:
        x, value = x * (1 + wider), value * (1 + worse)
        dots.append(Dot(x, value))
    low, high = (line_at(dots, 10.0, at).perplexity for at in sorted(pair))
    assert low <= high * (1 + 1e-9)


def test_speeds_that_were_measured_are_not_called_missing():
    placed = place_row(row("default", 15.0, ratio=0.5, speedup=1.5), [sibling(0.25, 40.0, speedup=0.9)], 10.0)
    assert placed.line_by == "parameters"
    (said_,) = said([row("default", 15.0, ratio=0.5, speedup=1.5)], [sibling(0.25, 40.0, speedup=0.9)])
    assert "(no sibling is faster than the dense model)" in said_
    (said_,) = said([row("default", 15.0, ratio=0.5)], [sibling(0.25, 40.0)])
    assert "(no speed measured)" in said_


def test_a_sibling_that_is_no_cheaper_says_nothing():
    assert line_at([Dot(0.9, 20.0), Dot(1.0, 30.0)], 10.0, 1.5) is None
    assert line_at([Dot(0.9, 20.0), Dot(4.0, 40.0)], 10.0, 2.0).perplexity == pytest.approx(20.0)


# bytes in place of tokens


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 1", "h\u00e9llo w\u00f6rld\n\n \u65e5\u672c \U0001f642"])
def test_tokens_of_bytes_add_up_to_the_text(text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text_bytes(ids, tokenizer) == sum(text_bytes([i], tokenizer) for i in ids) == len(text.encode())
    assert text_bytes([*ids, tokenizer.eos_token_id], tokenizer) == len(text.encode())


def sentence_piece():
    """Blanks as signs of their own, unknown characters in bytes, as Llama's and Gemma's first vocabularies."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"\u2581": 256, "a": 257, "\u2581a": 258, "<x>": 259}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True, unk_token="<x>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens(["aaa"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_pieces_and_bytes_of_characters_add_up_to_the_text():
    tokenizer, text = sentence_piece(), "a a\u00e9 aaa \U0001f642a"
    ids = tokenizer(text)["input_ids"]
    assert {"\u2581a", "<0xC3>", "aaa"} <= set(tokenizer.convert_ids_to_tokens(ids))
    assert text_bytes(ids, tokenizer) == sum(text_bytes([i], tokenizer) for i in ids) == len(text.encode())


def test_what_goes_on_from_a_prompt_keeps_its_first_blank():
    """Decoders of Llama 2's kind drop the first blank of any text; of a continuation it is the text's own."""
    tokenizer = sentence_piece()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    prompt, new = tokenizer("a")["input_ids"], tokenizer(" a aaa")["input_ids"]
    assert tokenizer.decode(new).startswith("a")
    assert decoded(tokenizer, prompt, new).startswith(" a")
    for before, expected in ((prompt, decoded(tokenizer, prompt, new)), ((), tokenizer.decode(new))):
        stream = TextStream(tokenizer, (), before)
        assert "".join([*(stream.push([token]) for token in new), stream.finish()]) == expected
        assert stream.tokens == new


def toy(size):
    """Tokens of `size` letters of two, and a model that knows nothing of them: every token is as likely."""
    names = [format(i, f"0{size}b").replace("0", "a").replace("1", "b") for i in range(2**size)]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("." * size), "isolated")
    made.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    return model, PreTrainedTokenizerFast(tokenizer_object=made)


def test_bits_per_byte_do_not_depend_on_how_a_distribution_is_cut_in_tokens(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("ab", k=16 * 8)))
    found = {size: perplexity(*toy(size), text=text, window=16) for size in (1, 2, 4)}
    for size, one in found.items():
        assert one.perplexity == pytest.approx(2**size)
        assert one.bits_per_byte == pytest.approx(1.0)
        assert one.scored_bytes == size * one.scored_tokens
        for other in found.values():  # what any of them would have at this one's tokens is what it has
            assert same_tokens(other.bits_per_byte, one.scored_bytes, one.scored_tokens) == pytest.approx(2**size)


@pytest.mark.parametrize(("protocol", "scored"), [("gptq", 63), ("llama.cpp", 31)])
def test_bits_per_byte_are_the_losses_over_the_bytes_of_the_scored_tokens(tmp_path, protocol, scored):
    text = tmp_path / "text.txt"
    text.write_text("The first sentence, and caf\u00e9.\n" * 60)
    model, tokenizer = moesaic.load("tiny", dtype=torch.float32)
    one = perplexity(model, tokenizer, text=text, window=64, protocol=protocol, max_tokens=256)
    assert one.scored_tokens == 4 * scored
    assert one.bits_per_byte == pytest.approx(math.log2(one.perplexity) * one.scored_tokens / one.scored_bytes)
    assert scored_text(tokenizer, text=text, window=64, protocol=protocol, max_tokens=256) == (
        one.scored_tokens, one.scored_bytes,
    )  # fmt: skip
    assert 1 < one.scored_bytes / one.scored_tokens < 8


# verdicts


def sibling(ratio, value, speedup=None, model="owner/small"):
    own = EvaluationResult(
        perplexity=value, tokens=4_096, protocol="gptq", window=2_048, text="", data_sha256="", tasks={}, versions={}
    )
    return FrontierSibling(
        model=model, fingerprint=model, active_parameters=1, active_ratio=ratio, bytes_per_token=2.0, perplexity=value,
        perplexity_ratio=value / 10, speedup=speedup, evaluation=own, machine="",
    )  # fmt: skip


def row(method, value, ratio=0.5, speedup=None, active=0.5):
    return FrontierRow(
        method=method, active=active, memory_factor=1.0, seed=0, plan="S2A2E8", expert_width=8, ffn_active=active,
        perplexity=value, perplexity_ratio=value / 10, speedup=speedup, active_ratio=ratio,
    )  # fmt: skip


def said(rows, siblings):
    return verdicts(summarise([place_row(row, siblings, 10.0) for row in rows]), siblings, 10.0)


def test_rows_stand_against_the_line_by_speed_where_there_is_one_and_say_which():
    siblings = [sibling(0.25, 40.0, speedup=2.0)]
    fast = place_row(row("default", 15.0, speedup=2.0**0.5), siblings, 10.0)
    assert (fast.line_by, fast.line, fast.extrapolated) == ("speed", pytest.approx(20.0), False)
    assert fast.over_line == pytest.approx(0.75)
    assert fast.line_by_parameters == pytest.approx(20.0)
    still = place_row(row("default", 15.0, ratio=0.125), siblings, 10.0)
    assert (still.line_by, still.line, still.extrapolated) == ("parameters", pytest.approx(80.0), True)
    assert still.line_by_speed is None
    bound = row("neurons", 10.0)
    assert place_row(replace(bound, plan=None), siblings, 10.0).over_line is None


def test_the_verdict_is_of_the_best_default_row_of_each_budget():
    siblings = [sibling(0.25, 40.0)]
    rows = [row("default", 19.0), row("default-fine", 18.0), row("coactivation", 11.0)]
    rows.append(row("default", 39.0, ratio=0.26, active=0.25))
    small, half = said(rows, siblings)
    assert half == (
        "At 50% of the active parameters (no speed measured), `default-fine` at 50% active is better than the smaller "
        "siblings' line: perplexity 18.0 against 20.0."
    )
    assert "`default` at 25% active is not better" in small
    assert small.endswith("perplexity 39.0 against 38.5; a sibling of that cost would do better.")


@pytest.mark.parametrize(
    ("one", "speedup", "ends"),
    [
        (row("flap", 41.0, speedup=1.9), 2.0, "take the sibling small, no dearer and at 40.0."),
        (row("flap", 11.0, speedup=0.9), 2.0, "take the dense model, which is no slower."),
        (row("flap", 50.0, speedup=4.0), 2.0, "against 160.0 (extrapolated: no sibling is that small)."),
    ],
)
def test_the_verdict_says_what_to_take(one, speedup, ends):
    (sentence,) = said([one], [sibling(0.25, 40.0, speedup)])
    assert sentence.endswith(ends)
    assert sentence.startswith(f"At {one.speedup:.2f} x the speed, `flap` at 50% active is ")
    placed = summarise([place_row(one, [sibling(0.25, 40.0, speedup)], 10.0)])[0]
    assert verdict(placed, [sibling(0.25, 40.0, speedup)], 10.0) == sentence


# whole runs


def letters():
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_smaller(tmp_path_factory.mktemp("family") / "small")


def test_other_weights_of_the_same_name_are_refused(tmp_path):
    """What was measured on the weights before would stand beside what is measured now."""
    ask = {"active": [0.5], "methods": ["flap"], "measurement": MEASUREMENT}
    save_smaller(tmp_path / "m", seed=0)
    frontier(str(tmp_path / "m"), tmp_path / "out", **ask)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "9"}))
    file = tmp_path / "out" / "frontier.json"
    content = json.loads(file.read_text())
    del content["setting"]["weights_fingerprint"]  # as results of before have it
    file.write_text(json.dumps(content))
    again = frontier(str(tmp_path / "m"), tmp_path / "out", **ask)  # another version may write a config so
    assert len(again.rows) == 1
    shutil.rmtree(tmp_path / "m")
    save_smaller(tmp_path / "m", seed=1)
    with pytest.raises(InputError, match="was measured on other weights"):
        frontier(str(tmp_path / "m"), tmp_path / "out", **ask)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("frontier")
    ask = {"active": [0.25, 0.5], "methods": ["static+closed-form"], "measurement": MEASUREMENT}
    return out, ask, frontier("tiny", out, siblings=[small, small], **ask)


def test_a_sibling_is_measured_as_the_rows_are(measured, small):
    out, _, result = measured
    (found,) = result.siblings
    own = moesaic.evaluate(*moesaic.load(small), max_tokens=4_096)
    assert found.perplexity == found.evaluation.perplexity == pytest.approx(own.perplexity, rel=1e-6)
    assert found.perplexity_ratio == found.perplexity / result.dense.perplexity
    assert found.label == "small"
    weights = active_weights(moesaic.load(small).model)
    assert found.active_ratio == pytest.approx(weights / active_weights(moesaic.load("tiny").model))
    assert (found.active_parameters, found.bytes_per_token) == (weights, 2 * weights)
    for one in result.rows:
        line = line_at([Dot(1 / found.active_ratio, found.perplexity)], result.dense.perplexity, 1 / one.active_ratio)
        assert one.line == line.perplexity
        assert (one.over_line, one.line_by) == (one.perplexity / one.line, "parameters")
    assert [line.over_line for line in result.summary] == [one.over_line for one in result.rows]
    assert read_frontier(out / "frontier.json") == result


def test_finished_siblings_are_kept_and_others_come_later(measured, small, tmp_path, monkeypatch):
    out, ask, before = measured
    monkeypatch.setattr("moesaic.comparison.frontier.convert", None)
    monkeypatch.setattr("moesaic.comparison.frontier._evaluate", None)
    assert frontier("tiny", out, siblings=[small], **ask) == before
    assert frontier("tiny", out, **ask).siblings == before.siblings
    monkeypatch.undo()
    asked = []
    kept = moesaic.comparison.frontier._evaluate
    monkeypatch.setattr("moesaic.comparison.frontier.convert", None)
    monkeypatch.setattr("moesaic.comparison.frontier._evaluate", lambda m, *a: asked.append(m) or kept(m, *a))
    other = save_smaller(tmp_path / "letters", tokenizer=letters(), vocab_size=256)
    after = frontier("tiny", out, siblings=[small, other], **ask)
    assert [str(model) for model in asked] == [other]
    assert [found.label for found in after.siblings] == ["small", "letters"]
    found, dense = after.siblings[1], after.dense
    nats = found.evaluation.bits_per_byte * math.log(2)
    assert found.evaluation.scored_bytes == found.evaluation.scored_tokens  # a token is a byte
    assert found.perplexity == pytest.approx(math.exp(nats * dense.scored_bytes / dense.scored_tokens))
    assert found.perplexity != found.evaluation.perplexity


def test_a_file_of_an_earlier_version_gets_its_line_without_new_conversions(measured, small, tmp_path, monkeypatch):
    out, ask, before = measured
    told = json.loads((out / "frontier.json").read_text())
    for name in ("siblings", "sibling_speeds", "verdict"):
        del told[name]
    for name in ("scored_tokens", "scored_bytes", "bits_per_byte"):
        del told["dense"][name]
    new = set(FrontierRow.__annotations__) | {"fingerprint"}
    told["rows"] = [{k: v for k, v in r.items() if k in new} for r in told["rows"]]
    (tmp_path / "frontier.json").write_text(json.dumps(told))
    monkeypatch.setattr("moesaic.comparison.frontier.convert", None)
    found = frontier("tiny", tmp_path, siblings=[small], **ask)
    assert [r.over_line for r in found.rows] == pytest.approx([r.over_line for r in before.rows])
    assert (found.dense.scored_tokens, found.dense.scored_bytes) == (
        before.dense.scored_tokens, before.dense.scored_bytes,
    )  # fmt: skip
    assert found.dense.bits_per_byte == pytest.approx(before.dense.bits_per_byte)


def test_speed_is_timed_in_turn_with_the_dense_model_and_once(measured, small, monkeypatch):
    out, ask, _ = measured
    ask = ask | {"measurement": replace(MEASUREMENT, speed=True), "siblings": [small]}
    result = frontier("tiny", out, **ask)
    timed = {speed.fingerprint: speed for speed in result.sibling_speeds}
    for found in result.siblings:
        assert found.speedup == timed[found.fingerprint].speedup > 0
        assert timed[found.fingerprint].details["bytes"] == found.bytes_per_token
    assert {one.line_by for one in result.rows} <= {"speed", "parameters"}
    monkeypatch.setattr("moesaic.comparison.frontier.sibling_speed", None)
    assert frontier("tiny", out, **ask) == result
    assert read_frontier(out / "frontier.json") == result


def test_table_verdict_chart_and_page_show_the_line(measured, small, run, tmp_path):
    out, _, _ = measured
    given = ["--active", "25,50", "--methods", "static+closed-form", "--tokens", "2048", "--max-tokens", "4096"]
    code, text, err = run("frontier", "tiny", "--siblings", small, "--out", out, "--no-speed", "--html", *given)
    assert (code, text) == (0, ""), err
    assert max(map(len, err.splitlines())) <= 80
    words = " ".join(err.split())
    result = read_frontier(out / "frontier.json")
    assert len(result.verdict) == 2
    assert all(part in words for part in ("ours/line", "smaller dense siblings", *result.verdict))
    assert all(f"{line.over_line:.3f}" in words for line in result.summary)
    code, text, err = run("frontier", "tiny", "--siblings", small, "--out", out, "--no-speed", "--json", *given)
    assert json.loads(text)["verdict"] == result.verdict
    figure = draw_frontier(result.summary, "tiny", result.siblings)
    panel = figure.axes[0]
    assert "small" in [label.get_text() for label in panel.texts]
    assert panel.get_xlabel() == "active parameters over the dense model's"
    (dashed,) = [line for line in panel.lines if (line.get_linestyle(), line.get_color()) == ("--", SIBLING)]
    assert list(dashed.get_xdata())[1:] == sorted((s.active_ratio for s in result.siblings), reverse=True)
    write_frontier_page(result, tmp_path / "frontier.html", "tiny")
    page = (tmp_path / "frontier.html").read_text()
    assert 'data-key="siblings"' in page
    assert ">small</text>" in page
    assert 'value="siblings" checked' in page


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny", "is the model itself"), ("tiny-moe", "is a Mixture-of-Experts or a conversion"),
        ("larger", "is not smaller"), ("short", "takes 256 tokens at once"), ("tny", "Did you mean 'tiny'"),
        ("", "has an empty name"),
    ],
)  # fmt: skip
def test_what_is_no_sibling_is_refused_before_any_work(tmp_path, run, name, says):
    if name == "larger":
        name = save_smaller(tmp_path / name, num_hidden_layers=6, intermediate_size=768)
    if name == "short":
        name = save_smaller(tmp_path / name, max_position_embeddings=256)
    code, out, err = run("frontier", "tiny", "--out", tmp_path / "f", "--siblings", name)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())
    assert not (tmp_path / "f").exists()


def test_siblings_are_a_list(tmp_path):
    with pytest.raises(InputError, match=r"give a list of models, such as \['demo'\]"):
        frontier("demo-1.5b", tmp_path / "f", siblings="demo")
