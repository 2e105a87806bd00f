"""Zero-shot tasks from files: choices, scored by the likelihood of each, and questions with one answer.

One JSON object a line: `{task, id, ctx, choices, gold}`; `{ctxs, cont, gold}` where the context differs and the
continuation is the same (winogrande); `{ctx, cont}` where the greedy continuation must equal `cont` (lambada). With
`question` in place of `ctx` it is asked by the model's chat template, and so is what has pictures (`image`, `images`);
`{question, answer}` is right if the greedy answer is that one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from os.path import isfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import clean, kind, picture_names
from ..calibration.files import read_text
from ..calibration.rows import parse_json
from ..calibration.windows import check_tokens
from ..errors import InputError
from ..models.families import context_length, embedding_rows
from ..models.processor import Processor, check_picture
from ..progress import Progress
from ..results import TaskScore
from ..serving.questions import Words, asked, tokenizer_of
from .continuations import Scored, predictions
from .perplexity import check_losses
from .questions import ANSWER_TOKENS, AT_ONCE, Question, answers, same, score_choices

BATCH_TOKENS, BATCH_ITEMS = 2_048, 32
MEAN = "mean"
"""Under which the mean over tasks stands among them."""


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) pairs, and which is right (None: the first must be the greedy text)."""

    task: str
    pairs: tuple[tuple[str, str], ...]
    gold: int | None
    pictures: tuple[Path, ...] = ()
    is_asked: bool = False
    """Whether contexts are asked by the model's chat template, as they are where there are pictures."""

    @property
    def length(self) -> int:
        """Characters of the longest pair."""
        return max(len(context + text) for context, text in self.pairs)


def read_tasks(path: Path, per_task: int | None = None) -> list[Item]:
    """Read the items of a task file; of each task the first `per_task` only, if that is given.

    Names of pictures start from the file's folder.

    Raises:
        InputError: a missing file, or a line that is not written in one of the ways above; a missing picture, a video.
    """
    if not isfile(path):
        raise InputError(f"no task file '{path}'")
    items: dict[str, list[Item]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, path, number)
        try:
            item = _item(row, path)
        except ValueError as error:
            raise InputError(
                f"{path}:{number} is not a task item ({error}); expected {{task, ctx, choices, gold}} or {{question, "
                "answer}, with 'image' beside them where there is one"
            ) from None
        for picture in item.pictures:
            check_picture(picture, f"{path}:{number}")
        items.setdefault(item.task, []).append(item)
    if not items:
        raise InputError(f"'{path}' holds no items")
    return [item for of_task in items.values() for item in of_task[:per_task]]


def _item(row: object, path: Path) -> Item:
    """Make the item of a row of a file; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"it is {kind(row)}")
    pictures = tuple(path.parent / name for name in picture_names(row, "it"))
    is_asked = bool(pictures) or "question" in row
    context = "question" if "question" in row else "ctx"
    answer = "answer" if "answer" in row and "cont" not in row else "cont"
    before = "" if is_asked else " "
    if "ctxs" in row:
        pairs = [(context, before + _text(row, answer)) for context in _texts(row, "ctxs")]
    else:
        choices = _texts(row, "choices") if row.get("choices") else [_text(row, answer)]
        pairs = [(_text(row, context), before + choice) for choice in choices]
    gold = row.get("gold")
    if gold is None and len(pairs) > 1:
        raise ValueError("choices without gold")
    if gold is not None and (type(gold) is not int or not 0 <= gold < len(pairs)):
        raise ValueError(f"gold is not the number of a choice, 0 to {len(pairs) - 1}")
    task = path.stem if is_asked and "task" not in row else _text(row, "task")
    if task == MEAN:
        raise ValueError(f"'{MEAN}' is the name of the mean over tasks, so no task can have it")
    return Item(task, tuple(pairs), gold, pictures, is_asked)


def have_pictures(items: Sequence[Item]) -> bool:
    """Tell whether some items have pictures."""
    return any(item.pictures for item in items)


def _text(row: dict[str, object], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"'{key}' is {kind(value)}, not text" if key in row else f"no '{key}'")
    return clean(value)


def _texts(row: dict[str, object], key: str) -> list[str]:
    value = row[key]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"'{key}' is no list of texts")
    return [clean(text) for text in value]


def check_items(words: Words, items: Sequence[Item]) -> None:
    """Check that a model can be asked items, before any costly work.

    Raises:
        InputError: items with pictures and no processor, or questions and no chat template.
    """
    if have_pictures(items) and not isinstance(words, Processor):
        raise InputError("items have pictures: give the model's processor, moesaic.load_processor(...), as tokenizer")
    if any(item.is_asked for item in items):
        asked(words, "?")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Words,
    items: list[Item],
    progress: Progress | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> dict[str, TaskScore]:
    """Score each task, and the mean over tasks.

    A score has `acc`, `acc_norm` (likelihood over the choice's characters), `stderr` of acc, and `n`. Of a question
    with one answer `acc` is whether the greedy answer, cut at the end of its turn, is the same (`same`).

    Args:
        model: a dense or converted model.
        tokenizer: the model's; for items with pictures its processor.
        items: as `read_tasks` gives them.
        progress: called with (finished, all) items, and `tasks`.
        answer_tokens: of an answer, at most.

    Raises:
        InputError: items that the model cannot be asked, or a picture that cannot be read.
    """
    check_items(tokenizer, items)
    right: dict[str, list[tuple[float, float | None]]] = {}
    # a task's continuations are about equally long, and items of about one length need little padding
    ordered = sorted(items, key=lambda item: (item.task, item.is_asked, item.length))
    for (task, is_asked), of_task in groupby(ordered, key=lambda item: (item.task, item.is_asked)):
        while group := list(islice(of_task, AT_ONCE if is_asked else BATCH_ITEMS)):
            judge = _asked if is_asked else _continued
            right.setdefault(task, []).extend(judge(model, tokenizer, group, answer_tokens))
            if progress:
                progress(sum(map(len, right.values())), len(items), "tasks")
    results = {task: _summary(hits) for task, hits in sorted(right.items())}
    return results | {MEAN: _mean(list(results.values()))}


def _continued(
    model: PreTrainedModel, words: Words, group: Sequence[Item], answer_tokens: int
) -> list[tuple[float, float | None]]:
    """Score items that are continued as they stand."""
    pairs = [pair for item in group for pair in item.pairs]
    scores = iter(score_pairs(model, tokenizer_of(words), pairs))
    return [_hits(item, [next(scores) for _ in item.pairs]) for item in group]


def _asked(
    model: PreTrainedModel, words: Words, group: Sequence[Item], answer_tokens: int
) -> list[tuple[float, float | None]]:
    """Score items that are asked: choices by likelihood, single answers by what the model says."""
    chosen = [Question(*pair, item.pictures) for item in group if item.gold is not None for pair in item.pairs]
    open_ones = [Question(*item.pairs[0], item.pictures) for item in group if item.gold is None]
    scores = iter(score_choices(model, words, chosen))
    said = iter(answers(model, words, open_ones, answer_tokens))
    return [
        (float(same(next(said), item.pairs[0][1])), None)
        if item.gold is None
        else _hits(item, [(next(scores), False) for _ in item.pairs])
        for item in group
    ]


def _mean(scores: Sequence[TaskScore]) -> TaskScore:
    """Average over tasks; `acc_norm` where all have it."""
    count = len(scores)
    normed = [score.acc_norm for score in scores if score.acc_norm is not None]
    return TaskScore(
        acc=sum(score.acc or 0 for score in scores) / count,
        acc_norm=sum(normed) / count if len(normed) == count else None,
        stderr=math.sqrt(sum((score.stderr or 0) ** 2 for score in scores)) / count,
        n=sum(score.n for score in scores),
    )


def _hits(item: Item, scores: Sequence[tuple[float, bool]]) -> tuple[float, float | None]:
    """Score one item: (acc, acc_norm), 0 or 1 each."""
    if item.gold is None:
        return float(scores[0][1]), float(scores[0][1])
    likelihood = [score for score, _ in scores]
    by_length = [score / max(1, len(text.strip())) for score, (_, text) in zip(likelihood, item.pairs, strict=True)]
    first, second = (float(max(range(len(by)), key=by.__getitem__) == item.gold) for by in (likelihood, by_length))
    return first, second


def _summary(hits: list[tuple[float, float | None]]) -> TaskScore:
    n = len(hits)
    acc = sum(hit for hit, _ in hits) / n
    normed = [norm for _, norm in hits if norm is not None]
    acc_norm = sum(normed) / n if len(normed) == n else None
    return TaskScore(acc=acc, acc_norm=acc_norm, stderr=math.sqrt(acc * (1 - acc) / max(1, n - 1)), n=n)


@torch.inference_mode()
def score_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Score (context, continuation) pairs.

    Returns:
        Of each, the continuation's log-likelihood in nats, and whether it is the greedy text.
    """
    longest = context_length(model.config)
    encoded = [_encode(tokenizer, *pair, longest) for pair in pairs]
    for ids, _ in encoded:
        check_tokens(torch.tensor(ids), embedding_rows(model), tokenizer)
    size = max(1, BATCH_TOKENS // max(len(ids) for ids, _ in encoded))
    return [score for i in range(0, len(encoded), size) for score in _score_batch(model, encoded[i : i + size])]


def _score_batch(model: PreTrainedModel, encoded: list[Scored]) -> list[tuple[float, bool]]:
    losses, greedy = [], []  # read together at the end: a GPU is not waited for at every pair
    for predicted_CV, target_C in predictions(model, encoded):
        losses.append(cross_entropy(predicted_CV, target_C, reduction="sum"))
        greedy.append((predicted_CV.argmax(-1) == target_C).all())
    check_losses(torch.stack(losses), "a task item", model.dtype)
    return list(zip((-torch.stack(losses)).tolist(), torch.stack(greedy).tolist(), strict=True))


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, longest: int) -> Scored:
    """Encode the text as a whole; long contexts lose their beginning, and BOS or end of text stands for an empty one.

    Raises:
        InputError: an empty context, and a tokenizer that has neither.
    """
    whole = tokenizer(context + continuation, verbose=False)["input_ids"]
    start = len(tokenizer(context, verbose=False)["input_ids"])
    if not start:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise InputError(
                f"the task item of '{continuation[:40]}' has no context, and this tokenizer nothing to begin with; "
                "leave it out"
            )
        whole, start = [first, *whole], 1
    start = max(1, min(start, len(whole) - 1))
    cut = max(0, len(whole) - longest)
    return Scored(whole[cut:], max(1, start - cut))
