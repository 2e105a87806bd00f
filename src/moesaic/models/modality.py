"""Which of the tokens that run are parts of pictures, for what decides by that.

Shapes: B sequences, L tokens in one, T = B L tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import ContextVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from .families import takes_pictures
from .processor import image_token_id

IS_IMAGE: ContextVar[Tensor | None] = ContextVar("is_image", default=None)
"""Of the tokens that a model runs, bool [T]; None where nothing tells."""


def check_modality(model: PreTrainedModel) -> None:
    """Check that a model takes pictures.

    Raises:
        InputError: it takes text only.
    """
    if not takes_pictures(model.config):
        raise InputError(f"'{model.config.model_type}' takes text only, so no rule can go by pictures; use another")


def tell_modality(model: PreTrainedModel) -> ExitStack:
    """Let a model tell, while it runs, which of its tokens are parts of pictures; closing what is returned ends that.

    Raises:
        InputError: the model takes text only.
    """
    check_modality(model)
    image = image_token_id(model.config)

    def before(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        ids_BL = named.get("input_ids", arguments[0] if arguments else None)
        IS_IMAGE.set(None if ids_BL is None else (ids_BL == image).flatten())

    def after(*_: object) -> None:
        IS_IMAGE.set(None)  # also where two have asked for it

    stack = ExitStack()
    stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(model.register_forward_hook(after, always_call=True).remove)
    return stack
