"""What models write: functions that pass tests, answers that are right, and text that agrees with the dense model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import NamedTuple, TypedDict, Unpack

from transformers import PreTrainedModel

from ..errors import InputError
from ..given import check, path, place
from ..models.tokenizer import decoded
from ..progress import Progress, unheard
from ..results import GenerationScore
from ..serving.generate import check_length
from ..serving.loading import Loaded, load
from ..serving.questions import Words, asked, encoded, inputs_of, tokenizer_of
from .agreement import Agreed, agreement, share
from .code_runner import Outcome, check_runner
from .continuations import Continued, continued
from .exercises import Code, Exercise, ExerciseSet, Text, cut, read_exercises
from .kept_answers import check_answers, write_answers
from .questions import end_of_turn

OPENING = 128
"""Tokens of a plain text that are its prompt."""
Files = str | Path | Sequence[str | Path]
Continuations = Mapping[str, list[list[int]]]
"""By the name of a set: the tokens that a reference wrote for each exercise."""


class Generating(TypedDict, total=False):
    """How generation is measured: settings of `evaluate` beside `generate`."""

    allow_code_execution: bool
    """Whether code that the model writes may run, within the limits of `run_program`; without it nothing runs."""
    reference: str | Path | Loaded | Continuations | None
    """The dense model, or what it wrote: the model is compared with its greedy tokens."""
    reference_tokens: int
    """That the reference writes for each prompt, at most [64]."""
    max_new_tokens: int
    """That the model writes for each prompt, at most [512]."""
    batch: int
    """Prompts that are continued together [16]."""
    chat: bool | None
    """Whether prompts go through the chat template; None: only questions do, where the model has one."""
    answers: str | Path | None
    """A file to write: JSON lines of `set, id, prompt, completion, passed, reason`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The same, with its defaults, and what is written."""

    sets: list[ExerciseSet]
    allow_code_execution: bool = False
    reference: str | Path | Loaded | Continuations | None = None
    reference_tokens: int = 64
    max_new_tokens: int = 512
    batch: int = 16
    chat: bool | None = None
    answers: str | Path | None = None


class Written(NamedTuple):
    """What a model wrote for one set, and what is made of it; empty where it was not asked to write."""

    prompts: list[list[int]]
    texts: list[str]
    outcomes: list[Outcome | None]
    ended: list[bool]


def read_request(generate: Files | None, items: int | None = None, **settings: Unpack[Generating]) -> Request:
    """Read what is to be generated and check how, before a model is loaded; nothing of no files.

    Raises:
        InputError: a file that is missing or of other rows; code without `allow_code_execution`, texts without
            `reference`, a setting that is no such number, or a folder that is missing.
        WorkError: programs cannot be run here.
    """
    check(items=items)
    files = [generate] if isinstance(generate, str | Path) else generate or []
    sets = [found for file in files for found in read_exercises(path(file), items)]
    request = Request(sets=sets, **settings)
    default = Request(sets=[])
    if not sets and (unused := [name for name, value in settings.items() if value != getattr(default, name)]):
        raise InputError(f"--{unused[0].replace('_', '-')} has no use without --generate; give that too")
    check(
        max_new_tokens=request.max_new_tokens,
        reference_tokens=request.reference_tokens,
        batch=request.batch,
        items=items,
    )
    names = [found.name for found in sets]
    if len(set(names)) < len(names):
        raise InputError(f"--generate has two files of the same name, {max(names, key=names.count)}; rename one")
    if request.reference is None and request.reference_tokens != default.reference_tokens:
        raise InputError("--reference-tokens has no use without --reference; give that too")
    for found in sets:
        if issubclass(found.kind, Code) and not request.allow_code_execution:
            raise InputError(
                f"'{found.name}' is judged by running code that the model writes, in a process with limits that is no "
                "sandbox against malice; give --allow-code-execution (Python: allow_code_execution=True) to agree"
            )
        if issubclass(found.kind, Text) and request.reference is None:
            raise InputError(
                f"'{found.name}' has texts, which are judged by what the dense model writes; name it: --reference DENSE"
            )
    if request.answers:
        check_answers(path(request.answers))
    if any(issubclass(found.kind, Code) for found in sets):
        check_runner()
    return request


def check_model(request: Request, model: PreTrainedModel, words: Words) -> None:
    """Check that a model can be asked what is planned, before any costly work.

    Raises:
        InputError: no chat template for `chat`, or a prompt that is longer than the model's context.
    """
    if request.chat:
        asked(words, "?")
    for found in request.sets:
        new = {"--max-new-tokens": request.max_new_tokens * (found.kind.score is not None)}
        new |= {"--reference-tokens": request.reference_tokens * (request.reference is not None)}
        for one, prompt in zip(found.exercises, encode(found, words, request.chat), strict=True):
            for option, most in new.items():
                check_length(model, len(prompt), most, option, f"the exercise {one.id} of '{found.name}'")


def evaluate_generation(
    request: Request, model: PreTrainedModel, words: Words, theirs: Continuations, progress: Progress | None = None
) -> dict[str, GenerationScore]:
    """Let a model write, and judge it: a score for each set of exercises.

    Args:
        request: what `read_request` made.
        model: a dense or converted model.
        words: its tokenizer or processor.
        theirs: what `reference_continuations` gave.
        progress: called with (finished, all, what is done).
    """
    tick = progress or unheard
    scores, rows = {}, []
    for found in request.sets:
        start = monotonic()
        written = _write(request, found, model, words, tick)
        wrote = theirs.get(found.name)
        same = agreement(model, written.prompts, wrote) if wrote else []
        scores[found.name] = _score(request, found, words, written, same, monotonic() - start)
        rows += _rows(found, request, words, written, wrote, same)
    if request.answers:
        write_answers(path(request.answers), rows)
    return scores


def reference_continuations(
    request: Request, model: PreTrainedModel, words: Words, progress: Progress | None = None
) -> Continuations:
    """Let the reference, loaded in the model's dtype beside it, continue all prompts; nothing without one.

    Raises:
        InputError: no such model, one of another vocabulary, or texts of other exercises.
    """
    given = request.reference
    if given is None:
        return {}
    if isinstance(given, Mapping):
        for one in request.sets:
            if len(texts := given.get(one.name, [])) != len(one.exercises):
                raise InputError(f"the reference wrote {len(texts)} texts for '{one.name}', which has other items")
        return given
    if not isinstance(given, Loaded):
        given = load(place(str(given)), dtype=model.dtype, device=model.device)
    if given.tokenizer.get_vocab() != tokenizer_of(words).get_vocab():
        raise InputError("--reference has another vocabulary than the model; give the model that it was made from")
    return continuations(request, given.model, words, progress)


def continuations(
    request: Request, model: PreTrainedModel, words: Words, progress: Progress | None = None
) -> dict[str, list[list[int]]]:
    """Continue the prompts of all sets greedily: what another model is then compared with."""
    found = {}
    for one in request.sets:
        made = _continue(request, one, model, words, request.reference_tokens, (), f"{one.name}, reference", progress)
        found[one.name] = [row.tokens for row in made]
    return found


def is_asked(kind: type[Exercise], words: Words, chat: bool | None) -> bool:
    """Tell whether exercises of a kind go through the chat template."""
    return bool(words.chat_template) and kind.asks if chat is None else chat


def encode(found: ExerciseSet, words: Words, chat: bool | None) -> list[list[int]]:
    """Write the prompts of a set as a model is given them: the tokens of each."""
    asks, tokenizer, made = is_asked(found.kind, words, chat), tokenizer_of(words), []
    for one in found.exercises:
        text = one.prompt(asks)
        inputs = inputs_of(words, asked(words, text)) if asks else encoded(tokenizer, text, special=True)
        tokens = inputs["input_ids"][0].tolist()
        made.append(tokens[:OPENING] if isinstance(one, Text) and one.is_opened else tokens)
        if not made[-1]:
            raise InputError(f"the exercise {one.id} of '{found.name}' has no tokens; leave it out")
    return made


def _continue(
    request: Request, found: ExerciseSet, model: PreTrainedModel, words: Words, most: int, stops: Sequence[str],
    note: str, progress: Progress | None,
) -> list[Continued]:  # fmt: skip
    prompts, asks = encode(found, words, request.chat), is_asked(found.kind, words, request.chat)

    def tick(done: int, tokens: int) -> None:
        if progress:
            progress(done, len(prompts), f"{note}, token {tokens}" if tokens else note)

    return continued(model, words, prompts, most=most, batch=request.batch, stops=stops, asked=asks, tick=tick)


def _write(request: Request, found: ExerciseSet, model: PreTrainedModel, words: Words, progress: Progress) -> Written:
    """Let the model write and judge each text; of texts that nobody judges it writes only what `answers` shows."""
    prompts, asks = encode(found, words, request.chat), is_asked(found.kind, words, request.chat)
    nothing = Written(prompts, [], [], [])
    if found.kind.score is None and not request.answers:
        return nothing
    most = request.max_new_tokens if found.kind.score else request.reference_tokens
    stops = () if asks else found.kind.stops
    made = _continue(request, found, model, words, most, stops, found.name, progress)
    text = partial(decoded, tokenizer_of(words))
    texts = [text(prompt, row.tokens) for prompt, row in zip(prompts, made, strict=True)]
    if asks and (end := end_of_turn(words)):
        texts = [cut(said, (end,)) for said in texts]
    outcomes = []
    for number, (one, said) in enumerate(zip(found.exercises, texts, strict=True)):
        progress(number, len(texts), f"{found.name}, judged")
        outcomes.append(one.judge(said, asks))
    return Written(prompts, texts, outcomes, [row.ended for row in made])


def _score(
    request: Request, found: ExerciseSet, words: Words, written: Written, same: Sequence[Agreed], seconds: float
) -> GenerationScore:
    right = [(int(outcome.passed), 1) for outcome in written.outcomes if outcome]
    passed = share(right) if right else None
    agreed = share([(one.hits, one.tokens) for one in same]) if same else None
    tokens = sum(one.tokens for one in same)
    return GenerationScore(
        kind=found.kind.kind, n=len(found.exercises), chat=is_asked(found.kind, words, request.chat),
        pass_at_1=passed.mean if passed and found.kind.score == "pass_at_1" else None,
        exact_match=passed.mean if passed and found.kind.score == "exact_match" else None,
        stderr=passed.stderr if passed else None, ended=sum(written.ended) / len(right) if right else None,
        agreement=agreed.mean if agreed else None, agreement_stderr=agreed.stderr if agreed else None,
        loss=sum(one.loss for one in same) / tokens if same else None,
        common_prefix=sum(one.prefix for one in same) / len(same) if same else None,
        reference_tokens=tokens if same else None, max_new_tokens=request.max_new_tokens, data_sha256=found.data_sha256,
        seconds=seconds,
    )  # fmt: skip


def _rows(
    found: ExerciseSet, request: Request, words: Words, written: Written, wrote: list[list[int]] | None,
    same: Sequence[Agreed],
) -> list[dict[str, object]]:  # fmt: skip
    """Write what people read: a row for each exercise."""
    if not written.texts:
        return []
    asks, tokenizer, rows = is_asked(found.kind, words, request.chat), tokenizer_of(words), []
    for i, one in enumerate(found.exercises):
        outcome = written.outcomes[i]
        row: dict[str, object] = {
            "set": found.name, "id": one.id, "prompt": one.prompt(asks), "completion": written.texts[i],
            "passed": outcome.passed if outcome else None, "reason": outcome.reason if outcome else "",
            "ended": written.ended[i],
        }  # fmt: skip
        if wrote:
            reference = decoded(tokenizer, written.prompts[i], wrote[i])
            row |= {"reference": reference, "agreement": same[i].hits / same[i].tokens, "common_prefix": same[i].prefix}
        rows.append(row)
    return rows
