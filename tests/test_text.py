import json

import pytest
from transformers import AutoTokenizer

from moesaic import InputError
from moesaic.calibration.documents import Document
from moesaic.calibration.text import bundled, read_documents, text_hash
from moesaic.calibration.windows import bos, token_windows
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


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no text"), ("not json", ":1 is not a JSON"), (json.dumps({"body": 1}), ":1 is not a JSON")],
)
def test_bad_files_are_named(tmp_path, content, says):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=says):
        read_documents([str(tmp_path / "bad.jsonl")])
    with pytest.raises(InputError, match="no text file"):
        read_documents([str(tmp_path / "missing.txt")])
