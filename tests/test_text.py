import copy
import csv
import gzip
import io
import json
import sys
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moesaic import InputError
from moesaic.calibration.chat import Piece, pieces
from moesaic.calibration.documents import KEYS, Document, Message, chat, document
from moesaic.calibration.text import bundled, read_documents, text_hash
from moesaic.calibration.windows import LONG, bos, cut_text, packed_windows, token_windows
from moesaic.checkpoint.builtin import tiny_folder

DOMAINS = {"c4", "stackexchange", "github", "book", "wikipedia", "math_tex"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_folder())


def test_bundled_text_has_six_domains_and_no_overlap():
    calibration, held_out = bundled("calibration"), bundled("heldout")
    assert {d.domain for d in calibration} == {d.domain for d in held_out} == DOMAINS
    assert not {d.text for d in calibration} & {d.text for d in held_out}
    assert 0.9e6 < sum(len(d.text.encode()) for d in calibration) < 1.1e6


def test_windows_open_with_bos_and_take_turns_over_domains(tokenizer):
    documents = [Document("a b c d e f g h " * 40, "x"), Document("1 2 3 4 5 6 7 8 " * 40, "y")]
    windows = token_windows(documents, tokenizer, 64, 16)
    assert windows.shape == (4, 16)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    texts = [tokenizer.decode(row[1:]) for row in windows]
    assert ["a" in t for t in texts] == [True, False, True, False]


def test_windows_are_spread_over_the_documents(tokenizer):
    documents = [Document(f"{i} " * 200, "x") for i in range(10)]
    windows = token_windows(documents, tokenizer, 5 * 32, 32)
    leading = {tokenizer.decode(row[1:]).split()[1] for row in windows}
    assert len(leading) == 5


def test_much_text_is_thinned_without_losing_what_is_wanted(tokenizer):
    short, long = Document("a few words.", "x"), Document("word " * 40_000, "x")
    assert token_windows([short, long, long], tokenizer, 256, 16).shape == (16, 16)
    books = [Document(f"{i} " * 20_000, "x") for i in range(8)]
    leading = {tokenizer.decode(row[1:]).split()[1] for row in token_windows(books, tokenizer, 8 * 32, 32)}
    assert len(leading) >= 7  # one may open with the end of another


def test_all_windows_in_equal_shares(tokenizer):
    documents = [Document("word " * 500, "x"), Document("word " * 100, "y")]
    windows = token_windows(documents, tokenizer, None, 16)
    few = len(token_windows([documents[1]], tokenizer, None, 16))
    assert len(windows) == 2 * few


def test_bos_is_found_only_where_there_is_one(tokenizer):
    assert bos(tokenizer) == [0]


def test_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"content": "two"}\n')
    documents = read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert [(d.domain, d.text) for d in documents] == [("a", "some text"), ("b", "one"), ("b", "two")]
    assert text_hash(documents) != text_hash(documents[:2])


def test_files_of_one_name_are_domains_of_their_own(tmp_path):
    sources = [str(tmp_path / folder / "train.txt") for folder in "ab"]
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text("some text")
    assert [d.domain for d in read_documents(sources)] == sources


ROWS = [f'Day {i}: the miller counted {i * 7 % 31} sacks,\r\n and "{i * 3 % 17}" were wet.' for i in range(20)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(delimiter):
    out = io.StringIO(newline="")
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerows([["id", "text"], *enumerate(ROWS)])
    return out.getvalue()


OBJECTS = [{"id": i, "text": text} for i, text in enumerate(ROWS)]
FORMS = {
    "rows.jsonl": lines(OBJECTS),
    "rows.JSONL": lines(OBJECTS).replace("\n", "\r\n"),
    "rows.ndjson": "\ufeff" + lines(OBJECTS),
    "rows.txt": "\n" + lines(OBJECTS),
    "rows.json": json.dumps(OBJECTS, indent=2),
    "rows.md": json.dumps(OBJECTS),
    "rows.Json": json.dumps(ROWS),
    "rows.csv": table(","),
    "rows.CSV": "\ufeff\r\n" + table(","),
    "rows.tsv": table("\t"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_are_the_same_documents_in_every_form(tmp_path, name, packed):
    path, data = tmp_path / name, FORMS[name].encode()
    if packed:
        path, data = path.with_name(name + ".gz"), gzip.compress(data, mtime=0)
    path.write_bytes(data)
    found = read_documents([str(path)])
    assert found == [Document(text, "rows") for text in ROWS]
    assert text_hash(found) == text_hash([Document(text, "x") for text in ROWS])


def test_plain_text_is_one_document_as_it_stands(tmp_path):
    logs = lines([{"level": "warn", "at": i} for i in range(9)])  # JSON, but no text within it
    for name, text in {"a.txt": "one\ntwo\n", "b": "[a link](b)", "c.py": "{1: 2}\n", "d.log": logs}.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert [d.text for d in read_documents([str(path)])] == [text]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.pdf", b"words", "named .pdf, which is not read; save its text as .txt"),
        ("a.HTML", b"<p>words", "named .html, which"),
        ("a.txt", b"%PDF-1.7 words", "is a PDF, not text"),
        ("a.txt", b"PK\x03\x04 words", "zip archive or office document"),
        ("a.txt", b"a\0b", "zero bytes: it is binary, or UTF-16 without a mark"),
        ("a.jsonl", '{"text": "words"}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8: iconv"),
        ("a.jsonl", '{"text": "words"}'.encode("utf-32"), "is UTF-32 text"),
        ("a.txt", "Café".encode("latin-1"), "not UTF-8 text .unexpected end of data at byte 3"),
        ("a.txt.gz", b"words", "named .gz and is not compressed"),
        ("a.txt.gz", gzip.compress(b"words" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": " "}', "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.csv", b"text\n", "holds no text"),
        ("a.csv", b"", "holds no text"),
    ],
)
def test_what_is_no_text_is_refused_by_its_true_name(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=says) as error:
        read_documents([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_too_much_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.calibration.files.MOST_BYTES", 2**20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(2**22)))
    with pytest.raises(InputError, match="more than 1 MiB of text"):
        read_documents([str(tmp_path / "bomb.txt.gz")])


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", GOOD + "not json", ":2 is not JSON that can be read .Expecting value, column 1"),
        ("a.jsonl", GOOD + '{"body": 1}', r":2 is a JSON object with 'body' .a number.; expected text in 'text'"),
        ("a.jsonl", GOOD + '{"text": NaN}', r":2 is a JSON object with 'text' .a number"),
        ("a.jsonl", GOOD + "[1]", ":2 is a list, not a JSON object"),
        ("a.jsonl", GOOD + "null", ":2 is null"),
        ("a.jsonl", GOOD + "5", ":2 is a number"),
        ("a.jsonl", GOOD + "[" * 200_000, ":2 is not JSON that can be read .nested too deeply"),
        ("a.jsonl", GOOD + f'{{"text": "a", "id": {"7" * 5_000}}}', ":2 is not JSON .* thousands of digits"),
        ("a.txt", GOOD * 5 + "not json", ":6 is not JSON"),
        ("a.json", '[{"text": "a"},\n{"text": ]', ":2 is not JSON that can be read"),
        ("a.json", '[{"text": "a"}, 5]', ", row 2 is a number"),
        ("a.csv", "id,body\n1,a\n", ":1 names the columns 'id, body'; expected text in 'text'"),
        ("a.csv", 'text\n"a\nb"\nc,d\n', ":4 has 2 cells, its first line 1"),
        ("a.csv", 'text\na\n"b\n', ":3 is no row of a table .unexpected end of data"),
        ("a.jsonl", '{"messages": "hello"}', ":1: 'messages' is text; expected a list of turns"),
        ("a.jsonl", '{"messages": ["hello"]}', "'messages', turn 1, is text; expected an object"),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": "a"}]}', "turn 1, is said by 'bot'; expected one of"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', "turn 1, has null for its content"),
        ("a.jsonl", '{"conversations": [{"from": "gpt", "value": 5}]}', "turn 1, has a number for its content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            "turn 1, holds 'image_url'; only text and 'image' are read",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
            "turn 1, calls tools, which is not read",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says) as error:
        read_documents([str(tmp_path / name)])
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_sources_that_are_no_files_are_named(tmp_path):
    for source, says in [
        (str(tmp_path / "missing.txt"), "no text file"),
        (str(tmp_path), "it is a folder; give the files in it"),
        ("x" * 5_000 + ".txt", "no text file"),
        ("~nobody-of-that-name/a.txt", "no text file"),
    ]:
        with pytest.raises(InputError, match=says):
            read_documents([source])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*sorted(KEYS), "role", "from", "value", "type", "x\n"]), inner, max_size=3)
    ),
    max_leaves=8,
)
SUFFIXES = st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".gz", ".csv.gz", ""])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(VALUES, max_size=4).map(lines).map(str.encode) | st.binary(max_size=40) | st.text().map(str.encode),
    SUFFIXES,
)
def test_whatever_is_in_a_file_it_is_text_or_refused_in_a_line(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix or '.x'}"
    path.write_bytes(data)
    refused = []
    try:
        found = read_documents([str(path)])
    except InputError as error:
        found, refused = [], str(error).splitlines()
    assert len(refused) == (not found)
    assert len(text_hash(found)) == 64
    assert all(d.text.strip() and d.text.encode() for d in found)


def test_halves_of_surrogate_pairs_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud800 b \ud83d\ude00"}')
    assert read_documents([str(tmp_path / "a.jsonl")])[0].text == "a \ufffd b \U0001f600"


TURNS = (Message("user", "Why?"), Message("assistant", "Because."))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}], "id": 3},
        {"instruction": "Why?", "output": "Because."},
        {"instruction": "Why?", "input": "", "output": "Because.", "text": "by another's template"},
        {"question": "Why?", "answer": "Because."},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                {"role": "assistant", "content": "Because.", "tool_calls": None},
            ],
            "prompt": "Why?",
        },
    ],
    ids=lambda row: "-".join(row),
)
def test_chats_and_instructions_are_turns(row):
    assert document(row, "x", "here") == Document("Why?\n\nBecause.", "x", messages=TURNS)


def test_pairs_and_texts_stay_as_they_stand():
    for answer in ("response", "completion"):
        assert document({"prompt": "Why?", answer: " So."}, "x", "here") == Document("Why? So.", "x", 4)
    for key in ("text", "content"):
        assert document({key: "Why?"}, "x", "here") == Document("Why?", "x")
    more = document({"instruction": "Translate.", "input": "Oui", "output": "Yes"}, "x", "here")
    assert more.messages[0].content == "Translate.\n\nOui"


def test_the_hash_tells_who_said_what():
    said, other = chat(TURNS, "x"), chat((Message("system", "Why?"), TURNS[1]), "x")
    assert len({text_hash([d]) for d in (said, other, Document(said.text, "x"))}) == 3


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = CHATML.replace("{{ m.content | trim }}", "{{ m.content if loop.last else m.content.split('/')[-1] }}")
EAGER = CHATML.replace("<|assistant|>{%", "<|assistant|><think>{%")
LONG_CHAT = (Message("system", "Be brief."), *TURNS, Message("user", "Sure?"), Message("assistant", "I think/ Yes."))


def with_template(tokenizer, template):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


@pytest.mark.parametrize(
    ("template", "scored"),
    [
        (CHATML, ["Because.<|end|>\n", "I think/ Yes.<|end|>\n"]),
        (EAGER, ["Because.<|end|>\n", "I think/ Yes.<|end|>\n"]),
        (FORGETFUL, ["Because.<|end|>\n", "I think/ Yes.<|end|>\n"]),
        ("{{ bos_token }}" + CHATML, ["Because.<|end|>\n", "I think/ Yes.<|end|>\n"]),
        ("{{ messages[-1].content }}", []),
    ],
)
def test_a_templates_text_is_kept_and_the_assistants_turns_count(tokenizer, template, scored):
    templated, said = with_template(tokenizer, template), chat(LONG_CHAT, "x")
    cut = pieces(said, templated, tokenizer.bos_token)
    whole = templated.apply_chat_template([m._asdict() for m in LONG_CHAT], tokenize=False)
    assert "".join(piece.text for piece in cut) == whole.removeprefix(tokenizer.bos_token)
    assert [piece.text for piece in cut if piece.scored] == scored


def test_a_template_that_writes_the_date_gives_the_same_text_on_every_day(tokenizer):
    dated = with_template(tokenizer, "{{ strftime_now('%d %b %Y %f') }} " + CHATML)
    first, again = ("".join(piece.text for piece in pieces(chat(LONG_CHAT, "x"), dated, "")) for _ in range(2))
    assert first == again
    assert first.startswith("01 January 2025 <|system|>Be brief.")


def test_turns_that_are_written_differently_once_others_follow_do_not_count(tokenizer):
    said = chat((TURNS[0], Message("assistant", "Hm./Because."), *LONG_CHAT[3:]), "x")
    cut = pieces(said, with_template(tokenizer, FORGETFUL), "")
    assert [piece.text for piece in cut if piece.scored] == ["I think/ Yes.<|end|>\n"]


def test_without_a_template_blank_lines_join_the_turns(tokenizer):
    cut = pieces(chat(TURNS, "x"), tokenizer, "")
    assert cut == [Piece("Why?\n\n", False), Piece("Because.", True, ends=True)]


def test_a_chat_that_the_template_refuses_is_named(tokenizer):
    refusing = with_template(tokenizer, "{{ raise_exception('turns must alternate') }}")
    with pytest.raises(InputError, match=r"chat of 'x' .turns must alternate.; leave out the one .* 'Why\?\\n"):
        token_windows([chat(TURNS, "x")], refusing, None, 16)


def test_windows_of_chats_are_the_templates_tokens(tokenizer):
    templated = with_template(tokenizer, "{{ bos_token }}" + CHATML)
    windows = token_windows([chat(TURNS, "x")] * 20, templated, None, 32)
    once = "<|user|>Why?<|end|>\n<|assistant|>Because.<|end|>\n"
    assert once * 2 in tokenizer.decode(windows[:, 1:].flatten())
    assert (windows == tokenizer.bos_token_id).sum() == len(windows)


@settings(deadline=None)
@given(st.text("ab \n", max_size=200), st.integers(2, 30))
def test_a_cut_text_joins_again(text, size):
    cut = list(cut_text(text, size))
    assert "".join(cut) == text
    assert all(size // 2 - 1 <= len(part) <= size for part in cut[:-1])
    assert len(cut[-1]) <= size


def test_documents_below_the_limit_are_tokenised_whole_and_longer_ones_in_parts(tokenizer, monkeypatch):
    given_text = []

    def spy(text, **options):
        given_text.append(text)
        return tokenizer(text, **options)

    spy.eos_token_id, spy.bos_token = tokenizer.eos_token_id, tokenizer.bos_token
    words = "".join(f"{i} " for i in range(10_000))[: LONG - 2]
    packed_windows([Document(words, "x")], spy, [], 64, 2)
    assert given_text == [words + "\n\n"]
    given_text.clear()
    book = "It was the best of times, it was the worst of times. " * 100_000
    windows = packed_windows([Document(book, "x")], spy, [], 64, 32)
    assert len(windows) >= 32
    assert sum(map(len, given_text)) < 0.1 * len(book)
    assert max(map(len, given_text)) <= LONG
    packed_windows([Document(book[:300_000], "x", prompt_characters=5)], spy, [], 64, 32)
    assert max(map(len, given_text)) <= LONG


def test_parquet_says_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1...PAR1")
    with pytest.raises(InputError, match=r"is Parquet; to read it: pip install 'moesaic\[datasets\]'"):
        read_documents([str(tmp_path / "rows.parquet")])


def test_parquet_is_read(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(OBJECTS), path)
    assert [d.text for d in read_documents([str(path)])] == ROWS
    said = [{"messages": [message._asdict() for message in TURNS]}]
    parquet.write_table(arrow.Table.from_pylist(said), path)
    assert read_documents([str(path)]) == [chat(TURNS, "rows")]
    parquet.write_table(arrow.Table.from_pylist([{"id": 1}]), path)
    with pytest.raises(InputError, match="has the columns 'id'; expected text in 'text'"):
        read_documents([str(path)])
    path.write_bytes(path.read_bytes()[:-20] + b"PAR1")
    with pytest.raises(InputError, match="is no Parquet file that can be read"):
        read_documents([str(path)])


def test_datasets_are_read_by_the_same_rules(monkeypatch):
    rows = [{"messages": [message._asdict() for message in TURNS]}]
    hub = ModuleType("datasets")
    hub.load_dataset = lambda name, split, streaming: iter(rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_documents(["someone/chats"]) == [chat(TURNS, "chats")]
    rows.append({"body": "words"})
    with pytest.raises(InputError, match=r"dataset 'someone/chats', row 2 is a JSON object with 'body'"):
        read_documents(["someone/chats"])
