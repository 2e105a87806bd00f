"""Text from a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import given
from ..errors import InputError, first_line
from ..models.families import context_length
from ..models.processor import Processor
from ..models.tokenizer import decoded
from .questions import Words, as_turn, encoded, on_model, opened, opens_chats, question, tokenizer_of

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: Words,
    prompt: str,
    *,
    images: Sequence[str | Path | Image] = (),
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
) -> str:
    """Continue a prompt, or answer a question about pictures: greedy at temperature 0, else sampled.

    Args:
        model: a dense or converted model.
        tokenizer: the model's; for pictures its processor, from `load_processor`.
        prompt: the text to continue.
        images: pictures or their files, which the prompt then asks about through the model's chat template.
        max_new_tokens: tokens to add, at most.
        temperature: of sampling.
        chat: whether the prompt goes through the model's chat template.
        seed: of sampling.

    Returns:
        The new text, without the prompt.

    Raises:
        InputError: an empty prompt, one that is longer than the model's context with the tokens to add, a setting that
            is no such number, `chat` where the model has no chat template, or pictures that cannot be read or that the
            model does not take.
    """
    check_request(prompt, max_new_tokens, temperature, seed)
    if images or (chat and isinstance(tokenizer, Processor)):
        made = question(tokenizer, prompt, opened(images))
    elif chat:
        made = _chat(model, tokenizer_of(tokenizer), prompt)
    else:
        made = encoded(tokenizer_of(tokenizer), prompt, special=True)
    inputs = on_model(model, made, tokenizer)
    check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens_1L = new_tokens(model, inputs, tokenizer, seed, max_new_tokens=max_new_tokens, **sampling)
    before = [] if chat or images else made["input_ids"][0].tolist()
    return decoded(tokenizer_of(tokenizer), before, tokens_1L[0].tolist())


def new_tokens(model: Any, inputs: Mapping[str, Tensor], words: Words, seed: int = 0, **settings: object) -> Tensor:
    """Generate by transformers' settings: what comes after the prompts, int64 [B, L], shorter ones padded.

    The seed is that of sampling; torch's own generators are left as they were.
    """
    tokenizer = tokenizer_of(words)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        made_BL: Tensor = model.generate(**inputs, pad_token_id=pad, **settings)
    return made_BL[:, inputs["input_ids"].shape[1] :]


def left_padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Put token sequences into one batch that ends together: `input_ids` and `attention_mask`, int64 [B, L]."""
    ids = [torch.tensor(row) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(one) for one in ids])}


def _chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Tensor]:
    """Make the inputs of a chat of one turn without pictures, as the model's tokenizer or processor would."""
    if not tokenizer.chat_template:
        raise InputError("this model has no chat template; drop --chat")
    try:
        turns = [as_turn(model, {"role": "user", "content": prompt})]
        text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))  # pyrefly: ignore[bad-argument-type]
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"the model's chat template fails: {first_line(error)}; drop --chat") from error
    return encoded(tokenizer, text, special=opens_chats(model, tokenizer, text))


def check_request(prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Check a request, whatever the model is, before one is loaded.

    Raises:
        InputError: an empty prompt, one that is no text, or a setting that is no such number.
    """
    if not given.text(prompt, "the prompt").strip():
        raise InputError("the prompt is empty; give some text")
    given.check(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def check_length(
    model: PreTrainedModel, prompt: int, new: int, option: str = "--max-new-tokens", name: str = "the prompt"
) -> None:
    """Check that so many tokens of a prompt and so many new ones are within the model's context.

    Raises:
        InputError: they are not.
    """
    longest = context_length(model.config)
    if prompt + new <= longest:
        return
    way = f"give {option} {longest - prompt} at most" if prompt < longest else "give a shorter one"
    raise InputError(
        f"{name} has {prompt:,} tokens and {option} {new} adds to it, which is more than the model's context of "
        f"{longest:,}; {way}"
    )
