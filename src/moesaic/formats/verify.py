"""Does stock transformers say what the converted model says?

Shapes: N sequences, L tokens in one, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..checkpoint.reader import Checkpoint
from ..errors import WorkError, first_line
from ..machine import free_memory
from ..models.families import auto_class
from ..results import Check
from .converted import Converted, shortened

TOKENS, WINDOW, LAYERS = 128, 32, 4
TOLERANCE = 0.05
"""Nats that a token's log-probabilities may be off: router weights are 1 within a thousandth (`docs/formats.md`)."""


@torch.no_grad()
def check(source: Converted, made: Path) -> Check:
    """Measure how far the written model is from the one it was written from, in float32 as stock transformers runs it.

    Random tokens, half of the sequences with positions spread over all that the model reaches, for what scales rotary
    positions shows only far out. A token whose experts were nearly tied may choose others and differ, hence the median.
    The first `LAYERS` layers and the head are compared, fewer if they do not fit in memory: what could be wrong with
    one layer alone, its weights, was compared bit by bit when it was written.

    Raises:
        WorkError: transformers cannot load it, or in a sequence half of the log-probabilities are off by more than
            `TOLERANCE`.
    """
    layers = layers_that_fit(source)
    generator = torch.Generator().manual_seed(0)
    shape = (TOKENS // WINDOW, WINDOW)
    tokens_NL = torch.randint(source.config.vocab_size, shape, generator=generator)
    expected = logits(source.load(torch.float32, layers), tokens_NL)
    gc.collect()  # the first model, before the second comes
    made_type = Checkpoint(made).config["model_type"]
    try:
        config = shortened(AutoConfig.from_pretrained(made, trust_remote_code=False), layers)
        with silence():  # it would list the layers that are left out
            stock = auto_class(config).from_pretrained(
                made, config=config, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many unrelated types for what a configuration may hold
        raise WorkError(f"transformers cannot load the model written as {made_type}: {first_line(error)}") from error
    given = logits(stock, tokens_NL)
    largest = (expected - given).abs().max().item()
    for name, found in (("converted model", expected), (f"model written as {made_type}", given)):
        if not found.isfinite().all():
            raise WorkError(f"logits of the {name} are NaN or infinite in float32; its weights are damaged")
    expected, given = expected.log_softmax(-1), given.log_softmax(-1)
    # what is all but impossible does not matter
    differences = (expected - given).abs().where(expected > -20, 0).amax(-1)
    median = differences.median(dim=1).values.max().item()
    if not median <= TOLERANCE:
        raise WorkError(
            f"the model written as {made_type} is not the converted one: log-probabilities differ by {median:.3g} nats "
            f"in half of the tokens, more than {TOLERANCE}"
        )
    agreement = (expected.argmax(-1) == given.argmax(-1)).float().mean().item()
    return Check(
        max_abs_logit_error=largest,
        median_difference=median,
        agreement=agreement,
        tokens=differences.numel(),
        layers=layers,
    )


@contextmanager
def silence() -> Iterator[None]:
    """Let transformers print only errors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def layers_that_fit(source: Converted) -> int:
    """Count the layers, at most `LAYERS`, whose float32 weights fit in half of the free memory; two at least."""
    count, shapes = source.config.num_hidden_layers, source.checkpoint.shapes()
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    layer = sum(size for name, size in sizes.items() if name.startswith(source.prefix(0)))
    outside = sum(size for name, size in sizes.items() if not name.startswith(source.outside.layers))
    if source.config.router == "pregate":  # which decides for all layers at once
        return count
    return min(count, LAYERS, max(2, (free_memory(torch.device("cpu")) // 2 - outside) // layer))


def logits(model: PreTrainedModel, tokens_NL: Tensor) -> Tensor:
    """Compute the logits of every next token, float32 [N, L, V], a sequence at a time; of the second half far out."""
    model.eval()
    count, length = tokens_NL.shape
    near = torch.arange(length)[None]
    far = torch.linspace(0, model.config.get_text_config().max_position_embeddings - 1, length).long()[None]
    found = []
    for number, tokens_1L in enumerate(tokens_NL.split(1)):
        positions = far if number >= count // 2 else near
        # without a mask, transformers takes a gap in the positions for the start of another text
        mask = torch.ones_like(tokens_1L)
        found.append(model(input_ids=tokens_1L, position_ids=positions, attention_mask=mask).logits.float())
    return torch.cat(found)
