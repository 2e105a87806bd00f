"""Wall-clock of a question about pictures: encoding them, prefill of visual and text tokens, decoding after them.

Shapes: L tokens of the question, pictures' included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..errors import InputError
from ..models.families import decoder_layers
from ..models.processor import Processor
from ..results import PictureSpeed
from ..serving.generate import check_length
from ..serving.questions import on_model, opened, question
from .clock import now

if TYPE_CHECKING:
    from PIL.Image import Image

ASKED = "What is in the picture?"


class Pass(NamedTuple):
    """Seconds of one run."""

    encode: float
    """Up to the first decoder layer: the vision tower, the projector, and putting their tokens among the text's."""
    prefill: float
    """From there on: all decoder layers and the head, for the last token."""
    decode: float
    """New tokens after that, with the cache."""


def picture_inputs(
    model: PreTrainedModel, processor: Processor | None, images: Sequence[str | Path | Image], new: int
) -> dict[str, Tensor]:
    """Make the inputs of a question about pictures.

    Raises:
        InputError: no processor, pictures that cannot be read or used, or more tokens than the model's context holds.
    """
    if processor is None:
        raise InputError("pictures need the model's processor: give moesaic.load_processor(...)")
    inputs = question(processor, ASKED, opened(images))
    check_length(model, inputs["input_ids"].shape[1], new, "--new")
    return on_model(model, inputs, processor)


def picture_speed(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    image_token_id: int,
    new: int,
    rounds: int,
) -> PictureSpeed:
    """Time a question about pictures, dense and converted in turns after a warm-up; medians over the rounds.

    Args:
        model: the converted vision-language model.
        dense: the model it came from.
        inputs: as `picture_inputs` makes them.
        image_token_id: the token that stands for a part of a picture.
        new: tokens decoded after the question.
        rounds: timed runs of each.
    """
    for each in (model, dense):
        run_once(each, inputs, 1)
    runs = [(run_once(model, inputs, new), run_once(dense, inputs, new)) for _ in range(rounds)]

    def median(of: Callable[[Pass, Pass], float]) -> float:
        return statistics.median(of(ours, theirs) for ours, theirs in runs)

    visual = int((inputs["input_ids"] == image_token_id).sum())
    return PictureSpeed(
        image_tokens=visual,
        text_tokens=inputs["input_ids"].shape[1] - visual,
        encode_ms=1e3 * median(lambda ours, _: ours.encode),
        dense_encode_ms=1e3 * median(lambda _, theirs: theirs.encode),
        prefill_ms=1e3 * median(lambda ours, _: ours.prefill),
        dense_prefill_ms=1e3 * median(lambda _, theirs: theirs.prefill),
        prefill_speedup=median(lambda ours, theirs: theirs.prefill / ours.prefill),
        decode_tokens_per_s=new / median(lambda ours, _: ours.decode),
        dense_decode_tokens_per_s=new / median(lambda _, theirs: theirs.decode),
        decode_speedup=median(lambda ours, theirs: theirs.decode / ours.decode),
    )


@torch.inference_mode()
def run_once(model: PreTrainedModel, inputs: Mapping[str, Tensor], new: int) -> Pass:
    """Answer a question with `new` greedy tokens, and time the parts of that."""
    cache = DynamicCache(config=model.config)
    with time_of_first_layer(model) as seen:
        start = now(model)
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
        after_prefill = now(model)
    next_11 = logits[:, -1:].argmax(-1)
    begun = now(model)
    for _ in range(new):
        next_11 = model(input_ids=next_11, past_key_values=cache).logits[:, -1:].argmax(-1)
    return Pass(seen[0] - start, after_prefill - seen[0], now(model) - begun)


@contextmanager
def time_of_first_layer(model: PreTrainedModel) -> Iterator[list[float]]:
    """Note when the first decoder layer is called."""
    seen: list[float] = []
    handle = decoder_layers(model)[0].register_forward_pre_hook(lambda *_: seen.append(now(model)))
    try:
        yield seen
    finally:
        handle.remove()
