"""The fields of a converted model's configuration in a stock `config.json`: what engines read there is the truth.

Under `CONFIG_KEY` stands only what the stock architecture cannot say, such as the router's kind; whatever it can, such
as the vocabulary's size or the rope, is read from where engines read it, so that an edit counts for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig

from .. import registry
from ..checkpoint.reader import Checkpoint
from ..compat import class_for
from ..errors import InputError, first_line
from ..moe.modeling import MODEL_TYPE, config_class
from ..results import Json
from .base import Format, MoesaicModelConfig, block_config

CONFIG_KEY = "moesaic"
"""The key of a stock config.json under which moesaic's own fields are kept."""
OWN_ONLY = {"model_type", "architectures", "transformers_version", "_name_or_path"}
"""Fields that both have and mean differently."""
FREE = {"transformers_version", "_name_or_path", "use_cache", "initializer_range"}
"""Fields whose change changes no output."""


def is_converted_stock(checkpoint: Checkpoint) -> bool:
    """Tell whether a folder holds a stock architecture that moesaic wrote."""
    return isinstance(checkpoint.config.get(CONFIG_KEY), dict)


def text_json(fields: Json) -> Json:
    """Find what a `config.json` says of the language model, or of the language tower of a vision-language model."""
    text = fields.get("text_config")
    return text if isinstance(text, dict) else fields


def stock_json(written: Json, fields: Json) -> Json:
    """Add moesaic's own fields to a stock configuration of a language model, those that it does not say itself."""
    visible, shared = as_read(written), shared_names(fields)
    own = {k: v for k, v in fields.items() if k not in shared or k not in visible or visible[k] != v}
    return written | {CONFIG_KEY: own}


def stock_whole_json(written: Json, fields: Json, model_type: str, architecture: str) -> Json:
    """Write the configuration of a vision-language model whose language tower is a stock Mixture-of-Experts.

    Args:
        written: of the tower, as the stock architecture has it.
        fields: of the whole model in moesaic's own format.
        model_type: of the whole stock model.
        architecture: its class.
    """
    text = stock_json(written, fields["text_config"])
    own = {"model_type": MODEL_TYPE, "dense_model_type": fields["dense_model_type"]}
    rest = {name: value for name, value in fields.items() if name != "dense_model_type"}
    return rest | {
        "model_type": model_type, "architectures": [architecture], "text_config": text, CONFIG_KEY: own,
        "tie_word_embeddings": False,
    }  # fmt: skip


def stock_config(format: Format, whole: PreTrainedConfig) -> Json:
    """Write the `config.json` of a model in a stock architecture, with what moesaic reads it back by."""
    config = block_config(whole)
    fields: Json = json.loads(whole.to_json_string())
    outside = registry.spec(format) if ":" in registry.spec(format) else None
    text_json(fields).update({"format": outside} if outside else {})
    written = format.config_json(config)
    if config is whole:
        return stock_json(written, fields)
    model_type = format.whole_model_type or fields["dense_model_type"]
    architecture = format.whole_architecture or architecture_of(model_type)
    return stock_whole_json(written, fields, model_type, architecture)


def architecture_of(model_type: str) -> str:
    """Name the class that transformers makes of a vision-language model's configuration."""
    config = CONFIG_MAPPING[model_type]
    return class_for(AutoModelForImageTextToText, config).__name__  # pyrefly: ignore[bad-argument-type]


def moesaic_fields(checkpoint: Checkpoint) -> Json:
    """Read the fields of moesaic's own format, of a folder in either format.

    Raises:
        InputError: the configuration is damaged.
    """
    if not is_converted_stock(checkpoint):
        return checkpoint.config
    config = checkpoint.config
    own: Json = config[CONFIG_KEY]
    if own.get("model_type") != MODEL_TYPE:
        raise damaged(checkpoint, f"'{CONFIG_KEY}' has model_type {own.get('model_type')!r}, not '{MODEL_TYPE}'")
    text = text_json(config)
    if not isinstance(text.get(CONFIG_KEY), dict):
        raise damaged(checkpoint, f"its text_config has no '{CONFIG_KEY}'")
    with making_sense(checkpoint):
        visible, shared = as_read(text), shared_names(text[CONFIG_KEY])
    said = {name: value for name, value in visible.items() if name in shared} | text[CONFIG_KEY]
    if text is config:
        return said
    rest = {name: value for name, value in config.items() if name != CONFIG_KEY}  # or it would be written on
    return rest | own | {"text_config": said}


def check_agreement(checkpoint: Checkpoint, format: Format, config: MoesaicModelConfig) -> None:
    """Check that a stock `config.json` says what moesaic would write there of the same model.

    Raises:
        InputError: it was changed in what moesaic's own fields say otherwise.
    """
    written = format.config_json(config)
    expected, visible = as_read(written), as_read(text_json(checkpoint.config))
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
