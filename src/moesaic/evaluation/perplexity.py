"""Perplexity under the field's three protocols; they give different numbers, so each is named beside its result.

Shapes: N windows, L tokens in one, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..calibration.text import bos, bundled, text_hash, token_windows
from ..errors import InputError

PROTOCOLS = ("gptq", "llama.cpp", "lm-eval")
Progress = Callable[[int, int], None]


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    text: Path | None = None,
    protocol: str = "gptq",
    window: int = 2_048,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`exp(mean next-token loss)` and what it was measured on.

    - `gptq`: rows joined as GPTQ and most papers do on WikiText-2, one token stream cut in windows; every token of a
      window but the first is scored.
    - `llama.cpp`: the raw file in windows; the second half of each window is scored (`llama-perplexity`).
    - `lm-eval`: loss of all tokens over the number of words, rolling windows without overlap (word perplexity).

    Without `text` the bundled held-out text of six domains is used, in windows of packed documents.

    Raises:
        InputError: unknown protocol, missing file, a window beyond the model's, or text shorter than one window.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol '{protocol}'; choose from: {', '.join(PROTOCOLS)}")
    longest = model.config.max_position_embeddings
    if not 2 <= window <= longest:
        raise InputError(f"--window {window} is not within 2 to {longest}, the model's longest")
    if max_tokens is not None and max_tokens < window:
        raise InputError(f"--max-tokens {max_tokens} is less than one window of {window}; lower --window")
    if text is None:
        if protocol != "gptq":
            raise InputError(f"protocol {protocol} reads a raw file; give one with --text")
        documents = bundled("heldout")
        tokens_NL = token_windows(documents, tokenizer, None, window)
        if max_tokens is not None:
            tokens_NL = tokens_NL[: max_tokens // window]
        data, words = text_hash(documents), 0
    else:
        if not text.is_file():
            raise InputError(f"no text file '{text}'")
        raw = text.read_text(encoding="utf-8")
        tokens_NL, words = _cut(raw, tokenizer, protocol, window, max_tokens)
        data = hashlib.sha256(raw.encode()).hexdigest()
    first = window // 2 if protocol == "llama.cpp" else 0
    total, count = 0.0, 0
    for done, tokens_L in enumerate(tokens_NL):
        losses = window_losses(model, tokens_L)[first:]
        total, count = total + losses.double().sum().item(), count + len(losses)
        if progress:
            progress(done + 1, len(tokens_NL))
    return {
        "perplexity": math.exp(total / (words if protocol == "lm-eval" else count)),
        "tokens": sum(map(len, tokens_NL)),
        "protocol": protocol,
        "window": window,
        "text": str(text.name) if text else "bundled held-out text, six domains",
        "data_sha256": data,
    }


@torch.inference_mode()
def window_losses(model: PreTrainedModel, tokens_L: Tensor) -> Tensor:
    """Next-token losses in nats of one window, float32 [L - 1]."""
    tokens_L = tokens_L.to(model.device)
    logits_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0, :-1]
    # in slices, so that the float32 copy of the logits stays small
    parts = zip(logits_LV.split(256), tokens_L[1:].split(256), strict=True)
    return torch.cat([cross_entropy(logits.float(), target, reduction="none") for logits, target in parts])


def _cut(raw: str, tokenizer: Any, protocol: str, window: int, max_tokens: int | None) -> tuple[Sequence[Tensor], int]:
    """(windows, words of the text that they hold)."""
    if protocol == "gptq":
        # the rows of the published data set keep their line end; its empty rows are empty strings
        rows = raw.split("\n")[: -1 if raw.endswith("\n") else None]
        raw = "\n\n".join(row + "\n" if row.strip() else "" for row in rows)
    start = bos(tokenizer)
    ids = tokenizer(raw, add_special_tokens=False, verbose=False)["input_ids"]
    words = len(raw.split())
    body = window - len(start)
    count = len(ids) // body
    if max_tokens is not None:
        count = min(count, max_tokens // window)
    if not count:
        raise InputError(f"the text holds {len(ids)} tokens, less than one window of {window}; lower --window")
    windows = [torch.tensor(start + ids[i * body : (i + 1) * body]) for i in range(count)]
    if protocol == "lm-eval":
        if count < len(ids) // body:
            words = len(tokenizer.decode(ids[: count * body]).split())
        elif len(ids) % body > 1:
            windows.append(torch.tensor(start + ids[count * body :]))
    return windows, words
