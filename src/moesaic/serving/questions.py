"""Questions as a model is asked them: by its chat template, which says where pictures stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.chat import rendered
from ..calibration.documents import Message
from ..calibration.windows import bos, check_tokens
from ..checkpoint.sources import resolve
from ..errors import InputError, first_line
from ..given import path, place
from ..models.families import embedding_rows, takes_pictures
from ..models.integrity import read_config
from ..models.processor import Processor, as_parts, check_takes_pictures, open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

Words = PreTrainedTokenizerBase | Processor
"""What makes a model's inputs: of text alone, or of pictures too."""


def load_processor(model: str | Path) -> Processor:
    """Load what makes a vision-language model's inputs of text and pictures.

    Args:
        model: as `load` takes it, dense or converted.

    Returns:
        The processor, for `complete` and `evaluate` in place of the tokenizer, which is its `.tokenizer`.

    Raises:
        InputError: no such model, one that takes text only, no processor in its folder, or Pillow is not installed.
    """
    folder = resolve(place(str(model)))
    config = read_config(folder)
    check_takes_pictures(config, model)
    return Processor(folder, config)


def tokenizer_of(words: Words) -> PreTrainedTokenizerBase:
    """Find the tokenizer, which a processor has in it."""
    return words.tokenizer if isinstance(words, Processor) else words


def opened(images: Sequence[str | Path | Image]) -> list[Image]:
    """Read pictures that a user gave as files; those that are pictures already stay.

    Raises:
        InputError: a file that is missing, a video, no picture or a damaged one, or Pillow is not installed.
    """
    return [open_picture(path(one)) if isinstance(one, str | Path) else one for one in images]


def asked(words: Words, prompt: str, pictures: int = 0) -> str:
    """Write a question by the model's chat template, pictures first, opened for its answer.

    Raises:
        InputError: there is no template, or it fails.
    """
    if not words.chat_template:
        raise InputError(
            "this model has no chat template, by which questions are asked and pictures placed; put its "
            "chat_template.jinja into its folder, or leave --chat, pictures and questions out"
        )
    # a processor puts a BOS before the text itself; for a tokenizer the template writes all
    opening = str(words.tokenizer.bos_token) if isinstance(words, Processor) and bos(words.tokenizer) else ""
    try:
        return rendered([Message("user", prompt, pictures)], words, opening, opened=True)
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"the model's chat template fails: {first_line(error)}") from error


def inputs_of(words: Words, text: str, pictures: Sequence[Image] = ()) -> dict[str, Tensor]:
    """Make what a model is called with for one text of its template and the pictures marked in it, a batch of one.

    Raises:
        InputError: pictures for a tokenizer alone, another number of them than of marks, or some that cannot be used.
    """
    if isinstance(words, Processor):
        return words.inputs(text, pictures)
    if pictures:
        raise InputError("pictures need the model's processor: give moesaic.load_processor(...) for the tokenizer")
    return encoded(words, text, special=False)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> dict[str, Tensor]:
    """Make a language model's inputs of a text, with the tokens that open any text or without."""
    found = tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def as_turn(model: PreTrainedModel, turn: dict[str, object]) -> dict[str, object]:
    """Write a turn of text as the model's template takes it: those of vision-language models go through its parts."""
    return as_parts(turn) if takes_pictures(model.config) else turn


def opens_chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Tell whether a BOS goes before what a template wrote: processors put one where none is, tokenizers do not."""
    return takes_pictures(model.config) and not (tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)))


def question(words: Words, prompt: str, pictures: Sequence[Image] = ()) -> dict[str, Tensor]:
    """Make what a model is called with for a question and its pictures, a batch of one.

    Raises:
        InputError: as `asked` and `inputs_of`.
    """
    return inputs_of(words, asked(words, prompt, len(pictures)), pictures)


def on_model(model: PreTrainedModel, inputs: Mapping[str, Tensor], words: Words) -> dict[str, Tensor]:
    """Bring inputs to where a model is, pixels in its dtype.

    Raises:
        InputError: tokens that the model has no embeddings for.
    """
    tokens = inputs["input_ids"]
    if isinstance(words, Processor):
        tokens = tokens[tokens != words.image_token_id]  # some families have no row for it
    check_tokens(tokens, embedding_rows(model), tokenizer_of(words))
    return {n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in inputs.items()}
