"""What of a benchmark fits the models' context and the machine's memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..given import check
from ..machine import free_memory
from ..models.families import embedding_rows
from ..serving.generate import check_length

PROMPT_TOKENS = 2_048
"""Of all sequences that are decoded at once: prompts of many sequences are cut to that, or they would take minutes."""


def cut_length(length: int, sequences: int) -> int:
    """Tell to how many tokens prompts are cut where so many are decoded at once; one alone stays as it is."""
    return length if sequences == 1 else min(length, max(2, PROMPT_TOKENS // sequences))


def check_sizes(
    model: PreTrainedModel, dense: PreTrainedModel, tokens_BL: Tensor, new: int, batches: Sequence[int], rounds: int
) -> None:
    """Check that models can run what is to be timed, in the memory that is free.

    Keys and values count three times: both models keep the prompt's, and each run copies one's.

    Raises:
        InputError: they cannot.
    """
    check(new=new, rounds=rounds)
    for size in batches:
        check(batch=size)
    if tokens_BL.ndim != 2 or not batches or len(tokens_BL) < max(batches):
        raise InputError(f"prompts of shape {tuple(tokens_BL.shape)} are too few for batches of {list(batches)}")
    for each in (model, dense):
        check_length(each, tokens_BL.shape[1], new, "--new")
        if (last := int(tokens_BL.max())) >= (rows := embedding_rows(each)):
            raise InputError(
                f"the prompts have token {last}, but the embeddings of the {each.config.model_type} model have "
                f"{rows:,} rows: it has another vocabulary; give the dense model that the other was converted from"
            )
    config = model.config.get_text_config()
    most = max(batches)
    prompt = cut_length(tokens_BL.shape[1], most)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 3 * 2 * config.num_hidden_layers * heads * width * (prompt + new)
    needed = most * (kept + 16 * config.hidden_size * prompt + config.vocab_size) * model.dtype.itemsize
    if needed > (free := free_memory(model.device)):
        raise InputError(
            f"--batch {most} with prompts of {prompt} and --new {new} needs about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; give less of one"
        )
