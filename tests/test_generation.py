"""What models write: prompts and judges, batches that change nothing, and agreement with a dense model."""

import gzip
import json
import math
from decimal import Decimal

import pytest
import torch
from torch.nn.functional import cross_entropy

import moesaic
from moesaic import ConvertConfig, InputError
from moesaic.evaluation import code_runner
from moesaic.evaluation.agreement import agreement, share
from moesaic.evaluation.continuations import continued
from moesaic.evaluation.exercises import (
    FUNCTION_STOPS,
    Function,
    Script,
    Text,
    WordProblem,
    cut,
    exercise,
    fenced,
    last_number,
    read_exercises,
)
from moesaic.evaluation.generation import continuations, encode, read_request
from moesaic.models.tokenizer import decoded

HEAD = 'def double(x):\n    """Twice x."""\n'
TEST = "def check(candidate):\n    assert candidate(3) == 6\n"
SOLVED = {"task_id": "t/0", "prompt": f"{HEAD}    return 2 * x\n    # ", "test": TEST, "entry_point": "double"}
WRONG = SOLVED | {"task_id": "t/1", "prompt": f"{HEAD}    return 3 * x\n    # "}
HEADED = {"prompt": "def f(x):"}
MBPP = {"task_id": 7, "text": "Double it.", "code": "", "test_list": ["assert double(3) == 6"], "test_setup_code": ""}
SUM = {"question": "What are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
TEXTS = [{"text": "The first of May was a day of"}, {"prompt": "import os\n\ndef"}, {"text": "One, two, three, " * 60}]
SHORT = {"max_tokens": 64, "window": 64}


@pytest.fixture(scope="module")
def tiny():
    return moesaic.load("tiny", dtype=torch.float32)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", *TEXTS)


# ---- prompts and judges


def test_a_function_is_cut_where_it_ends():
    body = "    y = 2\n\n    # a comment\n    return x * y\n"
    for more in (
        "\n\nprint(double(2))",
        "\ndef other(): pass",
        "\nclass A: pass",
        "\n# more",
        "\nif True: pass",
        "\n```",
    ):
        assert cut(body + more, FUNCTION_STOPS) == body + more[: more.rindex("\n")]
    assert cut(body, FUNCTION_STOPS) == body


def test_functions_are_judged_by_their_tests():
    one = Function(id="", head=HEAD, test=TEST, entry_point="double")
    assert one.judge("    return 2 * x\n\nprint(1 / 0)\n", asked=False).passed
    assert one.judge("    return x + 1\n", asked=False).reason == "AssertionError"
    assert one.judge("    return (\n", asked=False).reason.startswith("SyntaxError")
    answer = "Of course:\n```python\nimport math\ndef double(x):\n    return x + x\n```\nIt adds."
    assert one.judge(answer, asked=True).passed
    assert one.judge("```\n    return 2 * x\n```", asked=True).passed
    assert one.judge("    import sys\n    sys.exit(0)\n", asked=False).reason == "SystemExit: 0"


def test_an_answers_function_has_what_stood_before_the_head():
    head = f"from typing import List\ndef half(x): return x // 2\n{HEAD}"
    one = Function(id="", head=head, test=TEST, entry_point="double")
    assert one.judge("```python\ndef double(x) -> List:\n    return half(4 * x)\n```", asked=True).passed


def test_scripts_are_judged_by_their_tests():
    one = exercise(MBPP, "", 0)
    assert isinstance(one, Script)
    assert one.prompt(False) == '"""\nDouble it.\nassert double(3) == 6\n"""\n'
    assert one.judge("def double(x):\n    return 2 * x\n\nprint(double(1))", asked=False).passed
    assert one.judge("def triple(x):\n    return 3 * x", asked=False).reason.startswith("NameError")
    assert "must pass these tests:\n\n```python\nassert double(3) == 6" in one.prompt(True)
    setup = MBPP | {
        "test_setup_code": "two = 2",
        "test_imports": ["import math"],
        "test_list": ["assert f() == math.e"],
    }
    assert exercise(setup, "", 0).judge("import math\ndef f():\n    return math.e", asked=False).passed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"), ("so $1,234.50 in all.", "1234.5"), ("16 - 3 = 13.", "13"), ("5-3 is 2", "2"),
        ("#### -5", "-5"), ("#### 7 apples, not 9", "7"), ("The answer is -$.5", "-0.5"), ("9 #### none", "9"),
        ("1,000,000", "1000000"), ("none", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_number_counts(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_sums_are_right_by_their_number():
    one = exercise(SUM, "", 0)
    assert one.judge("It is 2 + 3 = 5.00", asked=True) == (True, "")
    assert one.judge(" 5\nQuestion: What are 2 and 2?\nAnswer: 4", asked=False).passed
    assert one.judge("It is 6", asked=True) == (False, "6 is not 5")
    assert exercise({"context": "2 + 3?", "answer": "5"}, "", 0).answer == 5


def test_fences_need_no_end():
    assert fenced("a\n```python\nx = 1\n```\nb\n```\ny\n```") == fenced("```py\nx = 1") == "x = 1"
    assert fenced("no block") == "no block"


def test_rows_are_told_apart_by_their_fields(tmp_path):
    path = tmp_path / "mixed.jsonl.gz"
    rows = [SOLVED, MBPP, SUM, {"prompt": "a", "response": "b"}, {"text": "c"}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    sets = read_exercises(path)
    assert [(s.kind, s.name, len(s.exercises)) for s in sets] == [
        (Function, "mixed-function", 1), (Script, "mixed-script", 1), (WordProblem, "mixed-wordproblem", 1),
        (Text, "mixed-text", 2),
    ]  # fmt: skip
    assert [s.name for s in read_exercises(path, 1)] == ["mixed"]


# ---- greedy continuations


def prompts_of(tokenizer, *texts):
    return [tokenizer(text)["input_ids"] for text in texts]


def naive(model, prompt, most, end):
    """The greatest logit, appended, one prompt at a time and without a cache."""
    tokens = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in end:
            break
    return tokens[len(prompt) :]


def test_batches_and_padding_change_nothing(tiny):
    model, tokenizer = tiny
    prompts = prompts_of(
        tokenizer, "The first", "import os\nfrom pathlib import Path\n\ndef", "A", "In the year 1984 it"
    )
    wanted = [naive(model, prompt, 12, [tokenizer.eos_token_id]) for prompt in prompts]
    for batch in (1, 3, 4):
        found = continued(model, tokenizer, prompts, most=12, batch=batch)
        assert [row.tokens for row in found] == wanted
        assert not any(row.ended for row in found)


def test_a_models_own_penalty_does_not_bend_greedy_text(tiny):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, "one one one one one one", "The the the the")
    wanted = continued(model, tokenizer, prompts, most=16, batch=2)
    before = model.generation_config.repetition_penalty
    model.generation_config.repetition_penalty = 5.0
    try:
        assert continued(model, tokenizer, prompts, most=16, batch=2) == wanted
    finally:
        model.generation_config.repetition_penalty = before


def test_texts_stop_at_a_stop_sequence_or_the_end_token(tiny):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, "The first", "A")
    free = continued(model, tokenizer, prompts, most=24, batch=2)
    text = decoded(tokenizer, prompts[0], free[0].tokens)
    assert len(text) > 20
    stop = text[8:14]
    stopped = continued(model, tokenizer, prompts, most=24, batch=2, stops=(stop,))
    said = decoded(tokenizer, prompts[0], stopped[0].tokens)
    assert stopped[0].ended
    assert cut(said, (stop,)) == cut(text, (stop,))
    assert len(said) < len(text)
    assert (stopped[1].tokens, stopped[1].ended) == (
        free[1].tokens,
        stop in decoded(tokenizer, prompts[1], free[1].tokens),
    )
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = end = free[0].tokens[5]
    try:
        ended = continued(model, tokenizer, prompts, most=24, batch=2)
    finally:
        model.generation_config.eos_token_id = before
    assert ended[0].tokens == free[0].tokens[: free[0].tokens.index(end) + 1]
    assert ended[0].ended


def test_a_prompts_own_stop_sequences_do_not_stop_it(tiny):
    prompts = prompts_of(tiny.tokenizer, "def a(): pass\nclass B: pass\ndef")
    free, stops = (
        continued(*tiny, prompts, most=2, batch=1, stops=stops)[0].tokens for stops in ((), ("\nclass", "\ndef"))
    )
    assert len(free) == len(stops) == 2


# ---- agreement


def test_agreement_is_what_single_passes_say(tiny):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, "The first", "import os\n\ndef", "A")
    theirs = [row.tokens for row in continued(model, tokenizer, prompts, most=9, batch=3)]
    theirs[1][4] = (theirs[1][4] + 1) % 1_000  # they part here
    theirs[2] = theirs[2][:3]
    for row, prompt, tokens in zip(agreement(model, prompts, theirs), prompts, theirs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(tokens)
        same = (logits.argmax(-1) == target).tolist()
        assert (row.hits, row.tokens) == (sum(same), len(tokens))
        assert row.prefix == (same.index(False) if False in same else len(same))
        assert row.loss == pytest.approx(cross_entropy(logits, target, reduction="sum").item(), rel=1e-4)


def test_the_common_prefix_is_that_of_free_running_texts(tiny, folders):
    """One pass over the other's text gives what two greedy texts have in common, without writing the second."""
    model, tokenizer = tiny
    other = moesaic.load("tiny", dtype=torch.float32).model
    with torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in other.named_parameters():
            if "down_proj" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    prompts = prompts_of(tokenizer, "The first", "import os\n\ndef", "A", "One, two,", "Once upon a time", "x = 1\n")
    theirs = [row.tokens for row in continued(other, tokenizer, prompts, most=16, batch=6)]
    mine = [row.tokens for row in continued(model, tokenizer, prompts, most=16, batch=6)]
    common = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), 16)
        for x, y in zip(theirs, mine, strict=True)
    ]
    assert len(set(common)) > 1
    assert [row.prefix for row in agreement(model, prompts, theirs)] == common


def test_a_share_has_the_error_of_drawing_its_items():
    flips = [(1, 1), (0, 1), (1, 1), (1, 1)]
    assert share(flips) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 3)))
    assert share([(3, 4), (30, 40)]) == pytest.approx((0.75, 0))
    assert share([(4, 8), (0, 2)]).mean == 0.4


def test_a_model_agrees_with_itself(tiny, texts):
    result = moesaic.evaluate(*tiny, generate=texts, reference=tiny, reference_tokens=8, **SHORT)
    score = result.generation["texts"]
    assert (score.kind, score.n, score.agreement, score.agreement_stderr) == ("text", 3, 1.0, 0.0)
    assert (score.common_prefix, score.reference_tokens) == (8.0, 24)
    assert score.pass_at_1 is score.exact_match is score.ended is None
    assert 0 < score.loss < 10
    assert "pass_at_1" not in score.to_dict()


def test_all_experts_agree_with_the_dense_model_and_half_of_them_less(tiny, texts, tmp_path):
    settings = {"partition": "random", "recovery": "none", "tokens": 512, "format": "moesaic"}
    found = {}
    for plan in ("S2A6E8", "S2A2E8"):
        moesaic.convert("tiny", tmp_path / plan, ConvertConfig(plan=plan, **settings), force=True)
        model, tokenizer = moesaic.load(tmp_path / plan, dtype=torch.float32)
        result = moesaic.evaluate(model, tokenizer, generate=texts, reference="tiny", reference_tokens=8, **SHORT)
        found[plan] = result.generation["texts"]
    assert (found["S2A6E8"].agreement, found["S2A6E8"].common_prefix) == (1.0, 8.0)
    assert found["S2A2E8"].agreement < 1
    assert found["S2A2E8"].common_prefix < 8
    assert found["S2A2E8"].loss > found["S2A6E8"].loss


def test_what_a_reference_wrote_can_be_kept(tiny, texts):
    request = read_request(texts, reference=tiny, reference_tokens=8)
    kept = json.loads(json.dumps(continuations(request, *tiny)))
    again = moesaic.evaluate(*tiny, generate=texts, reference=kept, **SHORT).generation["texts"]
    assert (again.agreement, again.reference_tokens) == (1.0, 24)
    with pytest.raises(InputError, match="wrote 3 texts for 'texts', which has other items"):
        moesaic.evaluate(*tiny, generate=texts, reference=kept, items=2, **SHORT)


def test_plain_texts_are_prompts_by_their_opening(tiny, texts):
    lengths = [len(prompt) for prompt in encode(read_exercises(texts)[0], tiny.tokenizer, None)]
    assert lengths[2] == 128
    assert lengths[0] == len(tiny.tokenizer(TEXTS[0]["text"])["input_ids"])


# ---- the verb


def test_pass_at_1_counts_what_passes(tiny, tmp_path):
    path, answers = write(tmp_path / "code.jsonl", SOLVED, WRONG, SOLVED), tmp_path / "answers.jsonl"
    notes = []
    result = moesaic.evaluate(
        *tiny, generate=[path], allow_code_execution=True, max_new_tokens=3, reference=tiny, reference_tokens=4,
        answers=answers, progress=lambda *step: notes.append(step), **SHORT,
    )  # fmt: skip
    score = result.generation["code"]
    assert (score.pass_at_1, score.n, score.agreement) == (pytest.approx(2 / 3), 3, 1.0)
    assert score.stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(row["id"], row["passed"], row["reason"]) for row in rows] == [
        ("t/0", True, ""), ("t/1", False, "AssertionError"), ("t/0", True, ""),
    ]  # fmt: skip
    assert rows[0]["prompt"] == SOLVED["prompt"]
    assert rows[0]["reference"].startswith(rows[0]["completion"])
    assert {note.split(",")[0] for _, _, note in notes} == {"perplexity", "code"}
    assert {note for _, _, note in notes} >= {"code, token 3", "code, judged", "code, reference, token 4"}


def test_nothing_runs_without_the_word_for_it(tiny, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(code_runner, "CHILD", tmp_path / "none.py")
    monkeypatch.setattr(code_runner.subprocess, "Popen", lambda *a, **k: ran.append(a))
    monkeypatch.setattr(tiny.model, "generate", lambda *a, **k: ran.append(a))
    for row in (SOLVED, MBPP):
        path = write(tmp_path / "code.jsonl", row)
        with pytest.raises(InputError, match="give --allow-code-execution"):
            moesaic.evaluate(*tiny, generate=path, **SHORT)
    assert not ran


def test_the_command_line_measures_generation(run, tmp_path):
    code, math_ = write(tmp_path / "code.jsonl", SOLVED, WRONG), write(tmp_path / "math.jsonl", SUM)
    common = ("--window", "64", "--max-new-tokens", "3", "--batch", "2", "--generate", code, "--generate", math_)
    status, out, err = run("evaluate", "tiny", *common)
    assert (status, out) == (2, "")
    assert "--allow-code-execution" in err
    status, out, err = run("evaluate", "tiny", *common, "--allow-code-execution", "--items", "2", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["tokens"] == 128  # two windows, as generation is what was asked for
    assert found["generation"]["code"]["pass_at_1"] == 0.5
    assert found["generation"]["math"].keys() >= {"exact_match", "stderr", "n", "ended", "data_sha256"}
    status, out, err = run("evaluate", "tiny", *common, "--allow-code-execution", "--reference", "tiny")
    assert (status, out) == (0, "")
    assert all(len(line) <= 80 for line in err.splitlines())
    for words in ("pass@1", "exact match", "agreement", "loss, nats", "common tokens", "continued as it stands"):
        assert words in err


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([SUM], ["--chat"], "has no chat template"),
        ([SUM], ["--batch", "0"], "--batch is 0"),
        ([SUM], ["--max-new-tokens", "100000"], "the exercise 0 of 'x' has"),
        ([SUM], ["--answers", "."], "is a folder"),
        ([MBPP | {"test_list": []}], ["--allow-code-execution"], "'test_list' is empty"),
        ([HEADED | {"test": ["assert f(1)"], "entry_point": "f"}], ["--allow-code-execution"], "a text that tests it"),
        ([HEADED | {"test": "pass", "entry_point": "no name"}], ["--allow-code-execution"], "the name of a function"),
        ([SUM], ["--answers", "nowhere/x.jsonl"], "there is no folder"),
        ([SUM | {"answer": "five"}], [], "has no number in its answer 'five'"),
        ([{"text": "a"}], [], "name it: --reference DENSE"),
        ([{"body": 1}], [], ":1 is a JSON object with 'body'; --generate reads"),
        ([MBPP | {"test_list": [1]}], ["--allow-code-execution"], "'test_list' is no list of texts"),
        ([5], [], "is a number; --generate reads"),
        ([], [], "holds no exercises"),
    ],
)
def test_bad_input_is_refused_before_any_work(run, tmp_path, rows, options, says):
    code, out, err = run("evaluate", "tiny", "--generate", write(tmp_path / "x.jsonl", *rows), *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err


def test_answers_take_the_place_of_earlier_ones_and_of_nothing_else(run, tmp_path):
    exercises, answers = write(tmp_path / "x.jsonl", SUM), tmp_path / "answers.jsonl"
    before = exercises.read_bytes()
    common = ("evaluate", "tiny", "--window", "64", "--max-new-tokens", "2", "--generate", exercises, "--answers")
    code, _, err = run(*common, exercises)
    assert (code, "holds no answers that were kept before" in err) == (2, True)
    assert exercises.read_bytes() == before
    for _ in range(2):
        assert run(*common, answers)[0] == 0
        assert json.loads(answers.read_text())["set"] == "x"


def test_settings_without_files_and_missing_files_are_refused(run, tmp_path, texts):
    code, _, err = run("evaluate", "tiny", "--reference", "tiny")
    assert (code, "--reference has no use without --generate" in err) == (2, True)
    code, _, err = run("evaluate", "tiny", "--generate", tmp_path / "none.jsonl")
    assert (code, "no file" in err) == (2, True)
    code, _, err = run("evaluate", "tiny", "--generate", texts, "--generate", texts, "--reference", "tiny")
    assert (code, "two files of the same name, texts" in err) == (2, True)
    (tmp_path / "plain.txt").write_text("words")
    code, _, err = run("evaluate", "tiny", "--generate", tmp_path / "plain.txt")
    assert (code, "holds no rows but plain text" in err) == (2, True)


def test_a_reference_has_the_models_vocabulary(tiny, texts, folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders("llama"))
    tokenizer.add_tokens(["<other>"])
    with pytest.raises(InputError, match="--reference has another vocabulary"):
        moesaic.evaluate(*tiny, generate=texts, reference=tiny._replace(tokenizer=tokenizer), **SHORT)
