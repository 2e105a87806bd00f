"""CalibrationText that a model writes itself: kept, gone on with, shared out, and what it is calibrated on."""

import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import moesaic
from moesaic import ConvertConfig, InputError
from moesaic.calibration.documents import Document
from moesaic.calibration.prompts import KINDS, OwnText, bundled_answers, own_text, prompt, read_prompts, sources_for
from moesaic.calibration.windows import labelled_windows, shares
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.comparison.rows import Measurement, hashed_name
from moesaic.conversion.prepare import prepare
from moesaic.conversion.tokens import CalibrationText
from moesaic.serving import own_text as writing
from moesaic.serving.own_text import documents_of, write


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "self"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(writing, "BATCH", 4)
    monkeypatch.setattr(writing, "LONGEST", 12)


CODE = OwnText("code", None)


def test_a_prompt_that_asks_nothing_is_refused_with_the_users_own_fields(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"foo": 1}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:1 is a JSON object with 'foo'; expected one of 'prompt'"):
        read_prompts(OwnText(None, tmp_path / "bad.jsonl"))


def test_few_wide_windows_are_written_for_each_kind(cache):
    """Each kind may leave a part of a window over, which is written too."""
    config = ConvertConfig(calibration=("self",), tokens=1_024, window=256, partition="coactivation")
    assert prepare("tiny", config).tokens.all().numel() >= 1_024


def test_bundled_prompts_are_of_every_kind_and_none_is_what_the_demo_asks():
    prompts = read_prompts(OwnText(None, None))
    assert {one.domain for one in prompts} == set(KINDS)
    assert all(bool(one.messages) or one.text for one in prompts)
    assert len({(one.text, one.messages) for one in prompts}) == len(prompts) > 200
    asked = " ".join(one.text + " ".join(turn.content for turn in one.messages) for one in prompts).lower()
    assert "fibonacci" not in asked
    assert "water is a molecule" not in asked
    assert [one for one in prompts if one.domain == "code"] == read_prompts(CODE)


@pytest.mark.parametrize(
    ("row", "text", "turns"),
    [
        ({"prompt": "def f():", "response": "pass"}, "def f():", []),
        ({"prompt": "def f():"}, "def f():", []),
        ({"text": "Once"}, "Once", []),
        ("Once", "Once", []),
        ({"question": "2 + 2?", "answer": "4"}, None, ["user"]),
        ({"instruction": "Add", "input": "2, 2"}, None, ["user"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, None, ["user"]),
        (
            {"messages": [{"role": r, "content": "a"} for r in ("system", "user", "assistant", "user")]},
            None,
            ["system", "user", "assistant", "user"],
        ),
    ],
)
def test_a_prompt_is_what_stands_before_the_answer(row, text, turns):
    found = prompt(row, "mine", "row 1")
    assert [turn.role for turn in found.messages] == turns
    assert text is None or (found.text == text and not found.prompt_characters)
    assert found.domain == "mine"


@pytest.mark.parametrize(
    "row", [{"messages": [{"role": "assistant", "content": "a"}]}, {"text": " "}, {"prompt": ""}, {"other": 1}, 3]
)
def test_a_row_without_a_prompt_is_refused(row):
    with pytest.raises(InputError, match="row 1"):
        prompt(row, "mine", "row 1")


def test_names_of_own_text(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n')
    assert own_text("self") == (None, None)
    assert own_text("self:chat") == ("chat", None)
    assert own_text(f"self:{file}") == (None, file)
    assert own_text("bundled") is own_text(str(file)) is None
    with pytest.raises(InputError, match="Did you mean 'chat'"):
        own_text("self:chad")
    with pytest.raises(InputError, match="self:FILE"):
        own_text("self:absent.jsonl")


def test_what_was_written_is_kept_and_gone_on_with(cache, short, monkeypatch):
    few = write(CODE, tiny_folder(), 100)
    [file] = cache.glob("*.jsonl")
    before = file.read_text()
    assert all(one.domain == "code" and len(one.text) > 0 for one in few)

    monkeypatch.setattr(writing, "load", None)  # nothing is written twice
    assert write(CODE, tiny_folder(), 100) == few
    monkeypatch.undo()
    monkeypatch.setenv("MOESAIC_CACHE", str(cache.parent))
    monkeypatch.setattr(writing, "BATCH", 4)
    monkeypatch.setattr(writing, "LONGEST", 12)
    more = write(CODE, tiny_folder(), 500)
    assert file.read_text().startswith(before)
    assert more[: len(few)] == few
    whole = file.read_text()

    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:20])  # torn in the last batch
    assert write(CODE, tiny_folder(), 500) == more
    assert file.read_text() == whole
    assert write(CODE, tiny_folder(), 100) == few


def test_kinds_and_seeds(cache, short):
    every = write(OwnText(None, None), tiny_folder(), 600)
    rows = [json.loads(line) for line in next(cache.glob("*.jsonl")).read_text().splitlines()]
    tokens = {kind: sum(row["tokens"] for row in rows if row["domain"] == kind) for kind in KINDS}
    assert all(count >= 200 for count in tokens.values())
    assert {one.domain for one in every} == set(KINDS)
    assert any(one.messages for one in every)
    other = write(OwnText(None, None), tiny_folder(), 600, seed=1)
    assert {one.text for one in every}.isdisjoint(one.text for one in other)


def test_prompts_are_all_asked_before_one_is_asked_again():
    prompts = [Document(str(i), "code") for i in range(10)]
    turns = writing._in_turn(prompts, 3)
    first, second = ([next(turns).text for _ in range(10)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(one.text for one in prompts)
    assert first != second


def test_an_answer_is_sampled_from_what_the_model_says(monkeypatch):
    """A prompt's padding changes nothing: alone and in a batch the logits of its first answered token are equal."""
    model, tokenizer = moesaic.load("tiny")
    seen = []
    original = writing.new_tokens

    def look(model, inputs, *arguments, **settings):
        with torch.inference_mode():
            mask = inputs["attention_mask"]
            position = (mask.cumsum(-1) - 1).clamp(min=0)
            seen.append(model(**inputs, position_ids=position).logits[:, -1].float())
        return original(model, inputs, *arguments, **settings)

    monkeypatch.setattr(writing, "new_tokens", look)
    prompts = [Document("The first", "text"), Document("In the year of the great flood the", "text")]
    writing.answer(prompts, model, tokenizer, 0)
    for one in prompts:
        writing.answer([one], model, tokenizer, 0)
    torch.testing.assert_close(seen[0], torch.cat(seen[1:]), rtol=1e-3, atol=2e-2)


def test_shares_by_weight():
    assert shares([9, 9, 9], 7, [1, 1, 1]) == [3, 2, 2]
    assert shares([99, 99, 99], 12, [1, 0.5, 0.5]) == [6, 3, 3]
    assert shares([2, 99, 99], 12, [1, 0.5, 0.5]) == [2, 5, 5]
    assert shares([1, 1], 5, [1, 1]) == [1, 1]


def test_equal_weights_are_dealt_in_turn():
    """As before there were weights: each domain in turn gets one more."""
    order = random.Random(0)
    for _ in range(50):
        available = [order.randrange(8) for _ in range(4)]
        wanted, share = order.randrange(30), [0] * 4
        while sum(share) < wanted and share != available:
            for i, most in enumerate(available):
                if share[i] < most and sum(share) < wanted:
                    share[i] += 1
        assert shares(available, wanted, [0.25] * 4) == share


def test_a_source_has_the_share_of_a_file_and_large_domains_do_not_stand_at_the_end(cache, short, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("mine and mine again. " * 4_000)
    documents = documents_of(["bundled", "self", str(file)], tiny_folder(), 3_072)
    _, tokenizer = moesaic.load("tiny")
    _, domain_N = labelled_windows(documents, tokenizer, 3_072, 64)
    names = list(dict.fromkeys(one.domain for one in documents))
    count = {name: int((domain_N == i).sum()) for i, name in enumerate(names)}
    bundled = len(names) - 1 - len(KINDS)
    assert count["mine"] == pytest.approx(16, abs=2)
    kinds = [f"self {kind}" for kind in KINDS]
    assert all(count[kind] == pytest.approx(16 / 3, abs=1) for kind in kinds)
    assert all(count[n] == pytest.approx(16 / bundled, abs=1) for n in names if n not in ("mine", *kinds))
    half = (domain_N[: len(domain_N) // 2] == names.index("mine")).sum()
    assert abs(int(half) - count["mine"] / 2) <= 1


def test_without_own_text_nothing_changes():
    documents = documents_of(["bundled"], tiny_folder(), 1_000)
    assert [replace(one, share=1.0) for one in documents] == documents_of([], tiny_folder(), 1_000)


def test_bundled_answers_are_to_the_bundled_prompts():
    every = bundled_answers("answers")
    assert {one.domain for one in every} == set(KINDS)
    asked = {one.messages or one.text for one in read_prompts(OwnText(None, None))}
    for one in every:
        if one.messages:
            assert one.messages[:-1] in asked
        else:
            assert any(isinstance(text, str) and one.text.startswith(text) for text in asked)
    assert bundled_answers("answers:chat") == [one for one in every if one.domain == "chat"]
    assert bundled_answers("bundled") is None
    with pytest.raises(InputError, match="Did you mean 'code'"):
        bundled_answers("answers:cod")


@pytest.mark.parametrize(
    ("use", "chats", "sources"),
    [
        (None, False, ()),
        (None, True, ("bundled", "answers")),
        ("text", True, ("bundled",)),
        ("code", True, ("bundled", "answers:code")),
        ("chat", False, ("bundled", "answers:chat")),
    ],
)
def test_what_a_model_is_for_chooses_its_text(use, chats, sources, tmp_path):
    assert sources_for(use, chats) == sources
    shutil.copytree(tiny_folder(), tmp_path / "model")
    if chats:
        (tmp_path / "model" / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        )
    config = ConvertConfig(partition="coactivation", tokens=2_048, for_use=use)
    conversion = prepare(str(tmp_path / "model"), config)
    assert conversion.config.calibration == sources
    domains = 6 if sources in ((), ("bundled",)) else 6 + (3 if use is None else 1)
    assert len(conversion.tokens.domain_N.unique()) >= domains - 2  # few windows
    assert conversion.config.for_use is None
    again = prepare(str(tmp_path / "model"), conversion.config)  # as OUT's own recipe
    assert torch.equal(again.tokens.calibration_NL, conversion.tokens.calibration_NL)
    if use:
        with pytest.raises(InputError, match=f"--for-use {use} chooses the calibration text where none is named"):
            prepare(str(tmp_path / "model"), config.model_copy(update={"calibration": ("bundled",)}))


def test_an_unknown_use_is_refused():
    with pytest.raises(InputError, match="--for-use"):
        ConvertConfig(for_use="poetry")


def test_convert_on_own_text(cache, short, tmp_path):
    said = []
    config = ConvertConfig(calibration=("self:code", "bundled"), tokens=1_024, partition="coactivation", window=64)
    done = moesaic.convert("tiny", tmp_path / "out", config, progress=lambda done, count, note: said.append(note))
    assert "the model writes its own text" in said
    assert done.perplexity < 3 * done.perplexity_dense
    assert list(cache.glob("*.jsonl"))
    again = moesaic.convert("tiny", tmp_path / "again", config)
    assert again.fingerprint == done.fingerprint


def test_nothing_is_written_for_what_cannot_work(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(writing, "load", None)
    for wrong in ({"plan": "S3A3E7"}, {"calibration": ("self:none",)}, {"router": "nothing"}):
        with pytest.raises(InputError):
            moesaic.convert("tiny", tmp_path / "out", ConvertConfig(**({"calibration": ("self",)} | wrong)))
    assert not cache.exists()


def test_a_file_that_is_called_as_a_bundled_domain_keeps_its_share(tmp_path):
    counts = {}
    for name in ("mine.txt", "book.txt"):
        (tmp_path / name).write_text("A text of my own about nothing at all.\n\n" * 400)
        documents = documents_of(("bundled", str(tmp_path / name)), tiny_folder(), 4_096)
        own = [one for one in documents if "nothing at all" in one.text]
        assert {one.domain for one in own} == {"mine" if name == "mine.txt" else "book (file)"}
        _, domain_N = labelled_windows(documents, AutoTokenizer.from_pretrained(tiny_folder()), 4_096, 64)
        number = list(dict.fromkeys(one.domain for one in documents)).index(own[0].domain)
        counts[name] = int((domain_N == number).sum())
    assert counts["mine.txt"] == counts["book.txt"] >= 30


def test_a_prompt_that_does_not_fit_is_named(cache, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "again " * 4_000}) + "\n")
    with pytest.raises(InputError, match=r"the prompt 'again again .*' has [\d,]+ tokens .* give a shorter one"):
        documents_of([f"self:{tmp_path / 'long.jsonl'}"], tiny_folder(), 64)


def test_domains_are_counted_without_writing_any(cache, short, monkeypatch, tmp_path):
    texts = tmp_path / "mine.txt"
    texts.write_text("A text of its own.\n" * 40)
    sources = ("self", str(texts), "self:code", "answers")
    written = {one.domain for one in documents_of(sources, tiny_folder(), 256)}
    monkeypatch.setattr(writing, "write", lambda *_: pytest.fail("the model wrote"))
    assert writing.count_domains(sources) == len(written) == 8
    assert writing.count_domains(()) == len({one.domain for one in documents_of((), tiny_folder(), 0)})
    with pytest.raises(InputError, match=r"needs a domain of text for each expert: 8, found 3"):
        prepare("tiny", ConvertConfig(plan="S0A1E8", partition="domains", calibration=("self",)))


def test_a_change_of_the_prompts_is_seen(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n')
    config = ConvertConfig(calibration=(f"self:{file}",))
    before = CalibrationText.of(config)
    os.utime(file, ns=(1, 1))
    assert CalibrationText.of(config) != before
    assert CalibrationText.of(config.model_copy(update={"seed": 5})) != CalibrationText.of(config)
    assert CalibrationText.of(ConvertConfig(seed=5)) == CalibrationText.of(ConvertConfig())


def test_a_frontier_knows_prompts_by_their_content_and_writes_nothing_before_its_checks(cache, monkeypatch, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n')
    before = hashed_name(f"self:{file}")
    assert before.startswith("self:mine.jsonl sha256:")
    file.write_text('{"prompt": "b"}\n')
    assert hashed_name(f"self:{file}") != before
    assert hashed_name("self:chat") == "self:chat"
    monkeypatch.setattr(writing, "load", None)
    with pytest.raises(InputError, match="unknown method"):
        moesaic.frontier("tiny", tmp_path / "f", methods=["no"], measurement=Measurement(calibration=("self",)))
    with pytest.raises(InputError, match="no text file"):
        moesaic.frontier("tiny", tmp_path / "f", measurement=Measurement(calibration=("self", "absent.txt")))
    assert not cache.exists()
