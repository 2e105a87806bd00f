"""What lies beside the weights: what a conversion was asked to do and gave, licences, and other files of a model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml
from pydantic import ValidationError

from ..config import ConvertConfig
from ..errors import InputError
from ..files import read_json, read_yaml
from ..results import ConversionResult, Json
from .builtin import BUILTINS
from .reader import is_adapter
from .sources import TERMS
from .writer import CONFIG_FILE

METRICS_FILE, GENERATION = "metrics.json", "generation_config.json"
ORIGIN = "copy it from the folder that 'moesaic convert' made"
TOKENIZER_MODEL = re.compile(r".*\.model")
"""SentencePiece's own file, which transformers does not save again and other programs read."""
CARD_FIELDS = ("license", "license_name", "license_link")


def saved_settings(folder: Path) -> Json:
    """Read what a conversion was asked to do, from its `moesaic.yaml`: `model`, `config`, `plan` and more.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / CONFIG_FILE
    if is_adapter(folder):
        raise InputError(
            f"'{folder}' is an adapter, which says how many experts of a model run; name the model, and the adapter as "
            "--adapter"
        )
    if not path.is_file():
        raise InputError(f"'{folder}' holds no {CONFIG_FILE}; expected a folder made by 'moesaic convert'")
    values = read_yaml(path, ORIGIN)
    for name, kind in (("model", str), ("config", dict)):
        if not isinstance(values.get(name), kind):
            raise InputError(f"'{path}' is damaged: {name} is {values.get(name)!r}; {ORIGIN}")
    known = {name: value for name, value in values["config"].items() if name in ConvertConfig.model_fields}
    try:
        settings = ConvertConfig.model_validate(known).model_dump(mode="json")
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"'{path}' is damaged: {reason}; {ORIGIN}") from error
    return values | {"config": settings | values["config"]}


def saved_result(folder: Path) -> ConversionResult:
    """Read what a conversion gave, from its `metrics.json`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise InputError(f"'{folder}' has no {METRICS_FILE}; {ORIGIN}")
    return ConversionResult.from_dict(read_json(path, ORIGIN), str(path))


def check_conversion_files(folder: Path) -> None:
    """Check that a converted model's folder holds what `convert` wrote beside the weights, whole.

    Raises:
        InputError: a file is missing or damaged.
    """
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"'{folder}' has no {name}; {ORIGIN}")
    saved_settings(folder)
    saved_result(folder)


def copy_generation(source: Path, made: Path) -> None:
    """Copy how a model is to generate, if its folder says."""
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, made / GENERATION)


def copy_terms(source: Path, made: Path) -> None:
    """Copy licences, notices and tokenizer models, which belong to a model whatever it is turned into."""
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.name.lower().startswith(TERMS) or TOKENIZER_MODEL.fullmatch(path.name)):
            shutil.copyfile(path, made / path.name)


def display_name(model: str | Path, source: Path) -> str:
    """Name a model; a folder by its name only, with a stroke to tell it from a built-in model."""
    return f"{source.name}/" if Path(model).is_dir() else str(model)


def origin(model: str, source: Path) -> Json:
    """Say what a model card says of the dense model: `base_model` and, where its own card has it, the licence."""
    if model in BUILTINS:
        builtin = BUILTINS[model]
        return {"base_model": builtin.hub_id, "license": builtin.license}
    own = front_matter(source / "README.md")
    return {"base_model": model.rstrip("/")} | {
        name: own[name] for name in CARD_FIELDS if isinstance(own.get(name), str)
    }


def front_matter(card: Path) -> Json:
    """Read the metadata that a model card begins with; empty where there is none."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8-sig"), re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # a card is for people, and may be anything
        return {}
    return values if isinstance(values, dict) else {}
