"""Zero-shot multiple choice from files, scored by the likelihood of each choice.

One JSON object a line: `{task, id, ctx, choices, gold}`; `{ctxs, cont, gold}` where the context differs and the
continuation is the same (winogrande); `{ctx, cont}` where the greedy continuation must equal `cont` (lambada).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from os.path import isfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import clean, kind
from ..calibration.files import read_text
from ..calibration.rows import parse_json
from ..calibration.windows import check_tokens
from ..errors import InputError
from ..models.families import embedding_rows
from ..results import TaskScore
from .perplexity import check_losses

BATCH_TOKENS, BATCH_ITEMS = 2_048, 32


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) pairs, and which is right (None: the first must be the greedy text)."""

    task: str
    pairs: tuple[tuple[str, str], ...]
    gold: int | None


def read_tasks(path: Path, per_task: int | None = None) -> list[Item]:
    """Read the items of a task file; of each task the first `per_task` only, if that is given.

    Raises:
        InputError: a missing file, or a line that is not written in one of the three ways above.
    """
    if not isfile(path):
        raise InputError(f"no task file '{path}'")
    items: dict[str, list[Item]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, path, number)
        try:
            item = _item(row)
        except ValueError as error:
            raise InputError(
                f"{path}:{number} is not a task item ({error}); expected {{task, ctx, choices, gold}}"
            ) from None
        items.setdefault(item.task, []).append(item)
    if not items:
        raise InputError(f"'{path}' holds no items")
    return [item for of_task in items.values() for item in of_task[:per_task]]


def _item(row: object) -> Item:
    """Make the item of a row; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"it is {kind(row)}")
    if "ctxs" in row:
        pairs = [(context, " " + _text(row, "cont")) for context in _texts(row, "ctxs")]
    else:
        choices = _texts(row, "choices") if row.get("choices") else [_text(row, "cont")]
        pairs = [(_text(row, "ctx"), " " + choice) for choice in choices]
    gold = row.get("gold")
    if gold is None and len(pairs) > 1:
        raise ValueError("choices without gold")
    if gold is not None and (type(gold) is not int or not 0 <= gold < len(pairs)):
        raise ValueError(f"gold is not the number of a choice, 0 to {len(pairs) - 1}")
    return Item(_text(row, "task"), tuple(pairs), gold)


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


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Item],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskScore]:
    """Score each task, and the mean over tasks.

    A score has `acc`, `acc_norm` (likelihood over the choice's characters), `stderr` of acc, and `n`.
    """
    right: dict[str, list[tuple[float, float]]] = {}
    # a task's continuations are about equally long, and items of about one length need little padding
    ordered = sorted(items, key=lambda item: (item.task, max(map(len, map("".join, item.pairs)))))
    for task, of_task in groupby(ordered, key=lambda item: item.task):
        while group := list(islice(of_task, BATCH_ITEMS)):
            scores = iter(score_pairs(model, tokenizer, [pair for item in group for pair in item.pairs]))
            right.setdefault(task, []).extend(_hits(item, [next(scores) for _ in item.pairs]) for item in group)
            if progress:
                progress(sum(map(len, right.values())), len(items))
    results = {task: _summary(hits) for task, hits in sorted(right.items())}
    count = len(results)
    mean = TaskScore(
        acc=sum(r.acc or 0 for r in results.values()) / count,
        acc_norm=sum(r.acc_norm or 0 for r in results.values()) / count,
        stderr=math.sqrt(sum((r.stderr or 0) ** 2 for r in results.values())) / count,
        n=sum(r.n for r in results.values()),
    )
    return results | {"mean": mean}


def _hits(item: Item, scores: Sequence[tuple[float, bool]]) -> tuple[float, float]:
    """Score one item: (acc, acc_norm), 0 or 1 each."""
    if item.gold is None:
        return float(scores[0][1]), float(scores[0][1])
    likelihood = [score for score, _ in scores]
    by_length = [score / max(1, len(text.strip())) for score, (_, text) in zip(likelihood, item.pairs, strict=True)]
    first, second = (float(max(range(len(by)), key=by.__getitem__) == item.gold) for by in (likelihood, by_length))
    return first, second


def _summary(hits: list[tuple[float, float]]) -> TaskScore:
    n = len(hits)
    acc, norm = (sum(column) / n for column in zip(*hits, strict=True))
    return TaskScore(acc=acc, acc_norm=norm, stderr=math.sqrt(acc * (1 - acc) / max(1, n - 1)), n=n)


@torch.inference_mode()
def score_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Score (context, continuation) pairs.

    Returns:
        Of each, the continuation's log-likelihood in nats, and whether it is the greedy text.
    """
    encoded = [_encode(tokenizer, *pair, model.config.max_position_embeddings) for pair in pairs]
    for ids, _ in encoded:
        check_tokens(torch.tensor(ids), embedding_rows(model), tokenizer)
    size = max(1, BATCH_TOKENS // max(len(ids) for ids, _ in encoded))
    return [score for i in range(0, len(encoded), size) for score in _score_batch(model, encoded[i : i + size])]


def _score_batch(model: PreTrainedModel, encoded: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    longest = max(len(ids) for ids, _ in encoded)
    tokens_BL = torch.zeros(len(encoded), longest, dtype=torch.int64)
    mask_BL = torch.zeros_like(tokens_BL)
    # padding on the left, so that continuations end together and few logits are kept
    for tokens_L, mask_L, (ids, _) in zip(tokens_BL, mask_BL, encoded, strict=True):
        tokens_L[longest - len(ids) :] = torch.tensor(ids)
        mask_L[longest - len(ids) :] = 1
    tokens_BL, mask_BL = tokens_BL.to(model.device), mask_BL.to(model.device)
    keep = max(len(ids) - start for ids, start in encoded) + 1
    output = model(input_ids=tokens_BL, attention_mask=mask_BL, use_cache=False, logits_to_keep=keep)
    losses, greedy = [], []  # read together at the end: a GPU is not waited for at every pair
    for logits_KV, tokens_L, (ids, start) in zip(output.logits, tokens_BL, encoded, strict=True):
        predicted_CV, target_C = logits_KV[start - len(ids) - 1 : -1].float(), tokens_L[start - len(ids) :]
        losses.append(cross_entropy(predicted_CV, target_C, reduction="sum"))
        greedy.append((predicted_CV.argmax(-1) == target_C).all())
    check_losses(torch.stack(losses), "a task item", model.dtype)
    return list(zip((-torch.stack(losses)).tolist(), torch.stack(greedy).tolist(), strict=True))


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, longest: int) -> tuple[list[int], int]:
    """Encode the text as a whole: (tokens, where the continuation starts); long contexts lose their beginning."""
    whole = tokenizer(context + continuation, verbose=False)["input_ids"]
    start = len(tokenizer(context, verbose=False)["input_ids"])
    start = max(1, min(start, len(whole) - 1))
    cut = max(0, len(whole) - longest)
    return whole[cut:], max(1, start - cut)
