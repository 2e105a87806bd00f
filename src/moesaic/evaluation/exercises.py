"""What a model is to write, and how that is judged: functions, answers that are numbers, and any text.

Rows of a file, told apart by their fields: `{task_id, prompt, test, entry_point}` (HumanEval), `{task_id, text or
prompt, test_list}` (MBPP), `{question or context, answer}` with a number in the answer (GSM8K), and `{prompt}` or
`{text}`, which nobody judges but the dense model.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from os.path import isfile
from pathlib import Path
from typing import ClassVar, NamedTuple

from ..calibration.documents import clean, kind
from ..calibration.files import plain_name
from ..calibration.rows import read_rows
from ..errors import InputError
from .code_runner import Outcome, run_program

EXPECTED = (
    "{task_id, prompt, test, entry_point} as in HumanEval, {text, test_list} as in MBPP, {question, answer} with a "
    "number in the answer as in GSM8K, or {prompt} or {text}"
)
FUNCTION_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\nimport", "\nfrom", "\n```")
"""End a function that a prompt began: HumanEval's own five (Chen et al. 2021, arXiv 2107.03374) and their like."""
SCRIPT_STOPS = ('\n"""', "\n'''", "\nclass", "\nassert", "\nprint", "\nif", "\n#", "\n```")
"""End the functions that a docstring asked for (MBPP)."""
ANSWER_STOPS = ("\nQuestion:",)
FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)
NUMBER = re.compile(r"((?<![\w)])-)?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")
BLOCK = "Answer with Python in one code block."
STEPS = "Think step by step. End your answer with #### and the number alone."


@dataclass(frozen=True, kw_only=True)
class Exercise(ABC):
    """Something that a model is to write."""

    id: str
    kind: ClassVar[str]
    score: ClassVar[str | None] = None
    """What the share of right ones is called; None: nothing is right or wrong."""
    asks: ClassVar[bool] = False
    """Whether a model that has a chat template is asked by it if nobody says otherwise."""
    stops: ClassVar[tuple[str, ...]] = ()
    """What ends a text that is continued as it stands; a chat ends with the model's turn."""

    @abstractmethod
    def prompt(self, asked: bool) -> str:
        """Write what is continued, or the question that goes into the chat template."""

    def judge(self, completion: str, asked: bool) -> Outcome | None:
        """Say whether a completion is right; None where only the dense model could."""
        return None


@dataclass(frozen=True, kw_only=True)
class Code(Exercise):
    """Python that passes tests."""

    kind = "code"
    score = "pass_at_1"

    @abstractmethod
    def program(self, completion: str, asked: bool) -> str:
        """Put a completion and its tests together."""

    def judge(self, completion: str, asked: bool) -> Outcome:
        """Run the program."""
        return run_program(self.program(completion, asked))


@dataclass(frozen=True, kw_only=True)
class Function(Code):
    """A function of which the head and the docstring are given (HumanEval)."""

    head: str
    test: str
    entry_point: str
    stops = FUNCTION_STOPS

    def prompt(self, asked: bool) -> str:
        if asked:
            return (
                f"Complete this Python function, and write all of it.\n{BLOCK}\n\n```python\n{self.head.strip()}\n```"
            )
        return self.head

    def program(self, completion: str, asked: bool) -> str:
        """Continue the head up to the function's end; of an answer take the block, with what stood before the head."""
        code = fenced(completion) if asked else cut(completion, self.stops)
        whole = re.search(rf"^def {re.escape(self.entry_point)}\b", self.head, re.MULTILINE)
        if asked and whole and f"def {self.entry_point}" in code:
            code = f"{self.head[: whole.start()]}\n{code}"
        else:
            code = self.head + code
        return f"{code}\n\n{self.test}\n\ncheck({self.entry_point})\n"


@dataclass(frozen=True, kw_only=True)
class Script(Code):
    """Functions that a sentence asks for, with the tests as examples (MBPP, zero-shot as in arXiv 2108.07732)."""

    text: str
    tests: tuple[str, ...]
    setup: str = ""
    stops = SCRIPT_STOPS

    def prompt(self, asked: bool) -> str:
        tests = "\n".join(self.tests)
        if asked:
            return f"{self.text}\n{BLOCK} It must pass these tests:\n\n```python\n{tests}\n```"
        return f'"""\n{self.text}\n{tests}\n"""\n'

    def program(self, completion: str, asked: bool) -> str:
        code = fenced(completion) if asked else cut(completion, self.stops)
        return "\n\n".join((code, self.setup, *self.tests)) + "\n"


@dataclass(frozen=True, kw_only=True)
class WordProblem(Exercise):
    """A question whose answer is a number (GSM8K)."""

    kind = "mathematics"
    score = "exact_match"
    asks = True
    question: str
    answer: Decimal
    stops = ANSWER_STOPS

    def prompt(self, asked: bool) -> str:
        return f"{self.question}\n\n{STEPS}" if asked else f"Question: {self.question}\n{STEPS}\nAnswer:"

    def judge(self, completion: str, asked: bool) -> Outcome:
        found = last_number(completion if asked else cut(completion, self.stops))
        if found == self.answer:
            return Outcome(True, "")
        return Outcome(False, "no number" if found is None else f"{found:f} is not {self.answer:f}")


@dataclass(frozen=True, kw_only=True)
class Text(Exercise):
    """A text to continue."""

    kind = "text"
    text: str
    is_opened: bool = False
    """Whether only its first tokens are the prompt."""

    def prompt(self, asked: bool) -> str:
        return self.text


class ExerciseSet(NamedTuple):
    """The exercises of one kind in a file."""

    name: str
    exercises: list[Exercise]
    data_sha256: str
    """Of the file."""

    @property
    def kind(self) -> type[Exercise]:
        """The class of them all."""
        return type(self.exercises[0])


def read_exercises(path: Path, most: int | None = None) -> list[ExerciseSet]:
    """Read the exercises of a file, the first `most` of it: a set for each kind of them.

    Raises:
        InputError: a missing file, one of other rows, or of none.
    """
    if not isfile(path):
        raise InputError(f"no file '{path}' of exercises; give one for --generate")
    rows = read_rows(path)
    if isinstance(rows, str):
        raise InputError(f"'{path}' holds no rows but plain text; --generate reads .jsonl of {EXPECTED}")
    kinds: dict[type[Exercise], list[Exercise]] = {}
    for number, row in enumerate(islice(rows, most)):
        found = exercise(row.value, row.where, number)
        kinds.setdefault(type(found), []).append(found)
    if not kinds:
        raise InputError(f"'{path}' holds no exercises; --generate reads .jsonl of {EXPECTED}")
    name, data = plain_name(path).stem, hashlib.sha256(path.read_bytes()).hexdigest()
    several = len(kinds) > 1
    return [
        ExerciseSet(f"{name}-{one.__name__.lower()}" if several else name, found, data) for one, found in kinds.items()
    ]


def exercise(row: object, where: str, number: int) -> Exercise:
    """Make the exercise of a row of a file, in which it has this number.

    Raises:
        InputError: it is none of those that are read.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is {kind(row)}; --generate reads {EXPECTED}")
    name = str(row.get("task_id", row.get("id", number)))
    prompt = _text(row, "prompt", "text", "content")
    question, answer = _text(row, "question", "context"), _text(row, "answer")
    if prompt and row.get("entry_point") is not None:
        test, entry_point = _text(row, "test"), _text(row, "entry_point")
        if not test or not entry_point.isidentifier():
            raise InputError(
                f"{where} has 'entry_point' {row['entry_point']!r:.60} and 'test' {row.get('test')!r:.60}; expected "
                "the name of a function, and a text that tests it"
            )
        return Function(id=name, head=prompt, test=test, entry_point=entry_point)
    if prompt and row.get("test_list") is not None:
        if not row["test_list"]:
            raise InputError(f"{where}: 'test_list' is empty, so any answer would pass; give tests, or leave it out")
        setup = "\n".join((*_lines(row, "test_imports", where), _text(row, "test_setup_code")))
        return Script(id=name, text=prompt, tests=_lines(row, "test_list", where), setup=setup)
    if question and answer:
        value = last_number(answer)
        if value is None:
            raise InputError(f"{where} has no number in its answer {answer[:40]!r}; --generate reads {EXPECTED}")
        return WordProblem(id=name, question=question, answer=value)
    if prompt:
        return Text(id=name, text=prompt, is_opened="prompt" not in row)
    keys = ", ".join(map(repr, row))[:100]
    raise InputError(f"{where} is a JSON object with {keys or 'nothing'}; --generate reads {EXPECTED}")


def _text(row: Mapping[str, object], *keys: str) -> str:
    """Read the text of the first of these fields that has one; empty where none has."""
    found = (row.get(key) for key in keys)
    return next((clean(value).replace("\r\n", "\n") for value in found if isinstance(value, str) and value.strip()), "")


def _lines(row: Mapping[str, object], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key) or []
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise InputError(f"{where}: '{key}' is no list of texts; --generate reads {EXPECTED}")
    return tuple(clean(line) for line in value)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Cut a text where the first of some stops begins."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def fenced(answer: str) -> str:
    """Take the first code block of an answer, which need not be closed; the whole where there is none."""
    found = FENCED.search(answer)
    return found[1] if found else answer


def last_number(text: str) -> Decimal | None:
    """Read the number that an answer ends with: behind `####` if it has that, else the last one in it."""
    marked = text.rpartition("####")[2]
    found = NUMBER.findall(marked) if "####" in text else []
    sign, digits = found[0] if found else next(iter(reversed(NUMBER.findall(text))), ("", ""))
    return Decimal(sign + digits.replace(",", "")) if digits else None
