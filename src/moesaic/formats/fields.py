"""The fields of a converted model's configuration in a stock `config.json`: what engines read there is the truth.

Under `CONFIG_KEY` stands only what the stock architecture cannot say, such as the router's kind; whatever it can, such
as the vocabulary's size or the rope, is read from where engines read it, so that an edit counts for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from transformers import CONFIG_MAPPING

from ..checkpoint.reader import Checkpoint
from ..errors import InputError, first_line
from ..moe.modeling import MODEL_TYPE, config_class
from ..results import Json
from .base import Format, MoesaicModelConfig

CONFIG_KEY = "moesaic"
"""The key of a stock config.json under which moesaic's own fields are kept."""
OWN_ONLY = {"model_type", "architectures", "transformers_version", "_name_or_path"}
"""Fields that both have and mean differently."""
FREE = {"transformers_version", "_name_or_path", "use_cache", "initializer_range"}
"""Fields whose change changes no output."""


def is_stock(checkpoint: Checkpoint) -> bool:
    """Tell whether a folder holds a stock architecture that moesaic wrote."""
    return isinstance(checkpoint.config.get(CONFIG_KEY), dict)


def stock_json(written: Json, fields: Json) -> Json:
    """Add moesaic's own fields to a stock configuration, those that it does not say itself."""
    visible, shared = as_read(written), shared_names(fields)
    own = {k: v for k, v in fields.items() if k not in shared or k not in visible or visible[k] != v}
    return written | {CONFIG_KEY: own}


def moesaic_fields(checkpoint: Checkpoint) -> Json:
    """Read the fields of moesaic's own format, of a folder in either format.

    Raises:
        InputError: the configuration is damaged.
    """
    if not is_stock(checkpoint):
        return checkpoint.config
    own: Json = checkpoint.config[CONFIG_KEY]
    if own.get("model_type") != MODEL_TYPE:
        raise damaged(checkpoint, f"'{CONFIG_KEY}' has model_type {own.get('model_type')!r}, not '{MODEL_TYPE}'")
    with making_sense(checkpoint):
        visible, shared = as_read(checkpoint.config), shared_names(own)
    return {name: value for name, value in visible.items() if name in shared} | own


def check_agreement(checkpoint: Checkpoint, format: Format, config: MoesaicModelConfig) -> None:
    """Check that a stock `config.json` says what moesaic would write there of the same model.

    Raises:
        InputError: it was changed in what moesaic's own fields say otherwise.
    """
    written = format.config_json(config)
    expected, visible = as_read(written), as_read(checkpoint.config)
    for name in (written.keys() & expected.keys() & visible.keys()) - FREE:
        if expected[name] != visible[name]:
            raise InputError(
                f"'{checkpoint.folder / 'config.json'}' contradicts itself: {name} is {visible[name]!r}, but by what "
                f"'{CONFIG_KEY}' says there it is {expected[name]!r}; undo the change, or convert again"
            )


@contextmanager
def making_sense(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of whatever goes wrong inside, where a configuration is made sense of, that it is damaged.

    Raises:
        InputError: something went wrong.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # transformers raises many unrelated types for what a configuration may hold
        raise damaged(checkpoint, error) from error


def damaged(checkpoint: Checkpoint, reason: object) -> InputError:
    """Say that a configuration cannot be read, and why."""
    return InputError(
        f"'{checkpoint.folder / 'config.json'}' is damaged: {first_line(reason)}; copy it from where it was made"
    )


def as_read(written: Json) -> Json:
    """Read a stock configuration as transformers does, with defaults and old names resolved."""
    plain = _as_json({name: value for name, value in written.items() if name != CONFIG_KEY})
    if plain.get("model_type") in CONFIG_MAPPING:
        plain = _as_json(CONFIG_MAPPING[plain["model_type"]].from_dict(plain).to_dict())
    rope = plain.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("partial_rotary_factor") == 1:  # written for engines, said by leaving it out
        plain["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    return plain


def _as_json(values: Json) -> Json:
    return json.loads(json.dumps(values))


def shared_names(fields: Json) -> frozenset[str]:
    """Name the fields that a stock configuration may say in place of moesaic's own: those of the dense family."""
    family = fields.get("dense_model_type")
    if family not in CONFIG_MAPPING:
        raise InputError(f"config.json has dense_model_type {family!r}, expected a model type of transformers")
    return _family_names(family)


@cache
def _family_names(family: str) -> frozenset[str]:
    return frozenset(config_class(CONFIG_MAPPING[family])().to_dict()) - OWN_ONLY
