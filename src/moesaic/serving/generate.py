"""Text from a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError


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
        InputError: `chat`, and the model has no chat template.
    """
    if chat and not tokenizer.chat_template:
        raise InputError("this model has no chat template; drop --chat")
    inputs: Any
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generation: Any = model  # its class mixes `generate` in
    tokens = generation.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
