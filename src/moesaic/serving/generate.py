"""Text from a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import given
from ..calibration.windows import check_tokens
from ..errors import InputError, first_line
from ..models.families import embedding_rows


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
) -> str:
    """Continue a prompt: greedy at temperature 0, else sampled.

    Args:
        model: a dense or converted model.
        tokenizer: the model's.
        prompt: the text to continue.
        max_new_tokens: tokens to add, at most.
        temperature: of sampling.
        chat: whether the prompt goes through the model's chat template.
        seed: of sampling.

    Returns:
        The new text, without the prompt.

    Raises:
        InputError: an empty prompt, one that is longer than the model's context with the tokens to add, a setting that
            is no such number, or `chat` where the model has no chat template.
    """
    check_request(prompt, max_new_tokens, temperature, seed)
    if chat and not tokenizer.chat_template:
        raise InputError("this model has no chat template; drop --chat")
    inputs: Any
    if chat:
        try:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise InputError(f"the model's chat template fails: {first_line(error)}; drop --chat") from error
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    check_tokens(inputs["input_ids"], embedding_rows(model), tokenizer)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generation: Any = model  # its class mixes `generate` in
    tokens = generation.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def check_request(prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Check a request, whatever the model is, before one is loaded.

    Raises:
        InputError: an empty prompt, one that is no text, or a setting that is no such number.
    """
    if not given.text(prompt, "the prompt").strip():
        raise InputError("the prompt is empty; give some text")
    given.check(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def check_length(model: PreTrainedModel, prompt: int, new: int, option: str = "--max-new-tokens") -> None:
    """Check that so many tokens of a prompt and so many new ones are within the model's context.

    Raises:
        InputError: they are not.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not longest or prompt + new <= longest:
        return
    way = f"give {option} {longest - prompt} at most" if prompt < longest else "give a shorter prompt"
    raise InputError(
        f"the prompt has {prompt:,} tokens and {option} {new} adds to it, which is more than the model's context of "
        f"{longest:,}; {way}"
    )
