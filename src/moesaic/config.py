"""What a conversion is asked to do, resolved from options and recipes and saved beside its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from . import registry
from .errors import InputError


class ConvertConfig(BaseModel):
    """Everything that decides a conversion's result; saved as `moesaic.yaml` with the output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    active: float | None = None
    """Share of each FFN that one token runs; the shape follows from it."""
    memory_factor: float = Field(1.0, gt=0)
    """Size of all experts relative to the dense FFN; `specialists` alone use more than 1, and `auto` may decline it."""
    plan: str | None = None
    """A fixed disjoint shape such as `S3A3E8`, instead of `active`."""
    expert_width: int | None = None
    """Neurons in a group."""
    fine: bool = False
    """About 64 groups in place of 16; with partition `auto`, try that too."""
    partition: str = "auto"
    """Partitioning method; `auto` tries `specialists` and `coactivation` on part of the model and takes the better."""
    router: str | None = None
    """Routing method; None takes the one that belongs to the partition."""
    recovery: str = "closed-form"
    calibration: tuple[str, ...] = ()
    """Text files, .jsonl files or `datasets` names; none means the bundled text."""
    tokens: int = Field(16_384, gt=0)
    """Calibration tokens."""
    window: int = Field(256, gt=1)
    """Tokens in one calibration sequence."""
    first_tokens: int | None = Field(None, ge=0)
    """Tokens, each a text's first, that recovery fits beside the others; None: an eighth of `tokens`, 0 after a BOS."""
    held_out_tokens: int = Field(4_096, gt=0)
    """Tokens of bundled held-out text for the perplexity that is compared with the dense model's."""
    format: str = "auto"
    """`moesaic` (the working form), a native form such as `glm4_moe`, or `auto`: the first native one that holds it."""
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    collapse_ratio: float = 100.0
    """Perplexity above this many times the dense model's is a collapse."""

    @field_validator("partition", "router", "recovery", mode="before")
    @classmethod
    def _spec(cls, value: Any) -> Any:
        """Python may give a method's instance, e.g. `partition=CMoE(top_k=20)`."""
        return value if value is None or isinstance(value, str) else registry.spec(value)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


Config = TypeVar("Config", bound=BaseModel)


def read_recipe(recipe: Path | None, section: str, kind: type[BaseModel]) -> dict[str, Any]:
    """The settings in a YAML file, or in `section` of a saved `moesaic.yaml`; none without a file.

    Raises:
        InputError: no such file, no mapping in it, or an unknown setting (with the nearest name).
    """
    if recipe is None:
        return {}
    if not recipe.is_file():
        raise InputError(f"no recipe '{recipe}'")
    try:
        content: Any = yaml.safe_load(recipe.read_text()) or {}
        content = dict(content.get(section, content))
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"'{recipe}' is not a YAML mapping of settings: {error}") from error
    for name in content:
        if name not in kind.model_fields:
            hint = registry.nearest(str(name), kind.model_fields)
            raise InputError(f"'{recipe}' has an unknown setting '{name}'.{hint}")
    return content


def build_config(kind: type[Config], settings: dict[str, Any]) -> Config:
    """A configuration of these settings.

    Raises:
        InputError: a value that does not fit; the message has the option's name.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{name} is {first['input']!r}: {first['msg'].lower()}") from error
