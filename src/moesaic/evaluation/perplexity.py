"""Perplexity under the field's three protocols; they give different numbers, so each is named beside its result.

Shapes: N windows, L tokens in one, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import BLANK_LINE, document
from ..calibration.rows import read_rows
from ..calibration.text import bundled, text_hash
from ..calibration.windows import bos, check_tokens, token_windows
from ..errors import InputError, WorkError
from ..models.families import context_length, embedding_rows
from ..progress import Progress
from ..results import PerplexityProtocol
from ..results.evaluation import perplexity_of
from .text_bytes import text_bytes

BUNDLED = "bundled held-out text, six domains"
"""What a text is called where none is named."""
PROTOCOLS = ("gptq", "llama.cpp", "lm-eval")


class MeasuredPerplexity(NamedTuple):
    """A perplexity, and what it was measured on."""

    perplexity: float
    tokens: int
    protocol: str
    window: int
    text: str
    data_sha256: str
    scored_tokens: int
    scored_bytes: int
    """Of the text that the scored tokens stand for, in UTF-8."""
    bits_per_byte: float | None
    """The loss over those bytes: models with different tokenizers compare by it."""


class Cut(NamedTuple):
    """The windows of a text that a protocol scores."""

    windows: Sequence[Tensor]
    skipped: Sequence[int]
    """Losses at the beginning of each window that are not scored."""
    words: int
    """Of the text in them, for word perplexity."""
    data_sha256: str = ""
    """Of the whole text."""


class ScoredText(NamedTuple):
    """What of a text is scored."""

    tokens: int
    bytes: int


def held_out_protocol(tokens_NL: Tensor) -> PerplexityProtocol:
    """Say how a perplexity on windows of the bundled held-out text was measured, [N, L]."""
    return PerplexityProtocol(
        text=BUNDLED, tokens=tokens_NL.numel(), window=tokens_NL.shape[1], data_sha256=text_hash(bundled("heldout"))
    )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: Path | None = None,
    protocol: str = "gptq",
    window: int = 2_048,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> MeasuredPerplexity:
    """Measure `exp(mean next-token loss)`.

    - `gptq`: rows joined by blank lines as GPTQ and most papers do on WikiText-2, one token stream cut in windows;
      every token of a window but the first is scored. Rows are the lines of a plain text, or the rows of other files.
    - `llama.cpp`: the raw file in windows; the second half of each window is scored (`llama-perplexity`).
    - `lm-eval`: loss of all tokens over the number of words (word perplexity); windows follow one another, each given
      the token before it, what is left over a whole window before it: BOS, else end of text, before the first. With a
      tokenizer that has neither the first token is not scored.

    Without `text` the bundled held-out text of six domains is used, in windows of packed documents.

    Raises:
        InputError: unknown protocol, a file that is missing or that the protocol is not defined on, a window beyond the
            model's, or text shorter than one window.
    """
    longest = context_length(model.config)
    stream = check_protocol(text, protocol, window, max_tokens)
    if not 2 <= window <= longest:
        raise InputError(f"--window {window} is not within 2 to {longest}, the model's longest")
    cut = _windows(stream, tokenizer, protocol, window, max_tokens)
    for tokens_L in cut.windows:
        check_tokens(tokens_L, embedding_rows(model), tokenizer)
    scored = _scored(cut, tokenizer)
    total, count = 0.0, 0
    for done, (tokens_L, skipped) in enumerate(zip(cut.windows, cut.skipped, strict=True)):
        losses = window_losses(model, tokens_L)[skipped:]
        check_losses(losses, f"window {done + 1} of {len(cut.windows)}", model.dtype)
        total, count = total + losses.double().sum().item(), count + len(losses)
        if progress:
            progress(done + 1, len(cut.windows), "perplexity")
    assert count == scored.tokens
    return MeasuredPerplexity(
        perplexity=perplexity_of(total / (max(1, cut.words) if protocol == "lm-eval" else count)),
        tokens=sum(map(len, cut.windows)),
        protocol=protocol,
        window=window,
        text=str(text.name) if text else BUNDLED,
        data_sha256=cut.data_sha256,
        scored_tokens=scored.tokens,
        scored_bytes=scored.bytes,
        bits_per_byte=total / math.log(2) / scored.bytes if scored.bytes else None,
    )


def scored_text(
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: Path | None = None,
    protocol: str = "gptq",
    window: int = 2_048,
    max_tokens: int | None = None,
) -> ScoredText:
    """Count what `perplexity` scores of a text, without a model.

    Raises:
        InputError: as `perplexity`.
    """
    cut = _windows(check_protocol(text, protocol, window, max_tokens), tokenizer, protocol, window, max_tokens)
    return _scored(cut, tokenizer)


def _scored(cut: Cut, tokenizer: PreTrainedTokenizerBase) -> ScoredText:
    pairs = zip(cut.windows, cut.skipped, strict=True)
    ids = [i for tokens_L, skipped in pairs for i in tokens_L[1 + skipped :].tolist()]
    return ScoredText(len(ids), text_bytes(ids, tokenizer))


def _windows(
    stream: Stream | None, tokenizer: PreTrainedTokenizerBase, protocol: str, window: int, max_tokens: int | None
) -> Cut:
    """Cut a text, or the bundled one, as a protocol does."""
    if stream is not None:
        found = _cut(stream.text, tokenizer, protocol, window, max_tokens)
        return found._replace(data_sha256=hashlib.sha256(stream.raw.encode()).hexdigest())
    documents = bundled("heldout")
    tokens_NL = token_windows(documents, tokenizer, None, window)
    windows = tokens_NL[: None if max_tokens is None else max_tokens // window].unbind()
    return Cut(windows, [0] * len(windows), 0, text_hash(documents))


class Stream(NamedTuple):
    """The text of a file under a protocol."""

    raw: str
    """As it is in the file, whose hash names it; rows joined by blank lines."""
    text: str
    """As it is measured."""


def check_protocol(text: Path | None, protocol: str, window: int, max_tokens: int | None) -> Stream | None:
    """Check a protocol and read its text, before any work; None: the bundled text.

    Raises:
        InputError: an unknown protocol, a file that is missing, no text or not what the protocol is defined on, or a
            limit below one window.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol '{protocol}'; choose from: {', '.join(PROTOCOLS)}")
    if max_tokens is not None and max_tokens < window:
        raise InputError(f"--max-tokens {max_tokens} is less than one window of {window}; lower --window")
    if text is None and protocol != "gptq":
        raise InputError(f"protocol {protocol} reads a raw file; give one with --text")
    if text is None:
        return None
    if not isfile(text):
        raise InputError(f"no text file '{text}'")
    stream = _stream(text, protocol)
    if not stream.text.strip():
        raise InputError(f"'{text}' holds no text")
    return stream


def _stream(path: Path, protocol: str) -> Stream:
    """Read a file, rows joined as GPTQ does."""
    raw = read_rows(path)
    if isinstance(raw, str):
        if protocol != "gptq":
            return Stream(raw, raw)
        # the rows of the published data set keep their line end; its empty rows are empty strings
        rows = raw.split("\n")[: -1 if raw.endswith("\n") else None]
        return Stream(raw, BLANK_LINE.join(row + "\n" if row.strip() else "" for row in rows))
    if protocol != "gptq":
        raise InputError(
            f"protocol {protocol} is defined on a raw text, '{path}' has rows; give it as .txt, or take gptq"
        )
    joined = BLANK_LINE.join(document(row.value, path.stem, row.where).text for row in raw)
    return Stream(joined, joined)


def check_losses(losses: Tensor, where: str, dtype: torch.dtype) -> None:
    """Check that losses are numbers.

    Raises:
        WorkError: one is NaN, or infinite, as after an overflow in float16.
    """
    if not losses.isfinite().all():
        raise WorkError(
            f"{where}: the model's logits are NaN or infinite in {str(dtype).removeprefix('torch.')}; "
            "calculate with --dtype float32, or bfloat16"
        )


@torch.inference_mode()
def window_losses(model: PreTrainedModel, tokens_L: Tensor) -> Tensor:
    """Compute the next-token losses of one window in nats, float32 [L - 1]."""
    tokens_L = tokens_L.to(model.device)
    logits_LV = model(input_ids=tokens_L[None, :-1], use_cache=False).logits[0]
    # in slices, so that the float32 copy of the logits stays small
    parts = zip(logits_LV.split(256), tokens_L[1:].split(256), strict=True)
    return torch.cat([cross_entropy(logits.float(), target, reduction="none") for logits, target in parts])


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, protocol: str, window: int, max_tokens: int | None) -> Cut:
    """Cut text into windows."""
    start, short = bos(tokenizer), 0
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if protocol == "lm-eval":
        # each window is scored whole, given the token before it: a prefix, then the last one of the window before
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*(start or end), *ids]
        cut = [ids[i : i + window + 1] for i in range(0, len(ids) - 1, window)]
        left = len(cut[-1]) - 1 if cut else 0
        if len(cut) > 1 and left < window:  # what is left over has a whole window before it
            cut[-1], short = ids[-window - 1 :], window - left
    elif protocol == "llama.cpp":
        ids = [*start, *ids]
        whole = range(0, len(ids) // window * window, window)
        cut = [[*start, *ids[i + len(start) : i + window]] for i in whole]  # BOS takes the place of the first token
    else:
        body = window - len(start)
        cut = [[*start, *ids[i : i + body]] for i in range(0, len(ids) // body * body, body)]
    if not cut or len(cut[0]) < window:
        raise InputError(f"the text holds {len(ids)} tokens, less than one window of {window}; lower --window")
    words = len(text.split())
    if max_tokens is not None and max_tokens // window < len(cut):
        cut = cut[: max_tokens // window]
        words = len(str(tokenizer.decode([i for part in cut for i in part[1:]])).split())
        short = 0
    skipped = [window // 2 if protocol == "llama.cpp" else 0] * len(cut)
    skipped[-1] += short
    return Cut([torch.tensor(part) for part in cut], skipped, words)
