"""What users may give, whichever way they give it: numbers within limits, paths with `~`, text that is Unicode."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError


@dataclass(frozen=True)
class Limit:
    """The numbers that a setting may have."""

    least: float
    most: float
    whole: bool = True
    open: bool = False
    """Whether `least` itself is too little."""
    hint: str = ""
    """What the number is, for the message."""

    def __str__(self) -> str:
        kind = self.hint or ("a whole number" if self.whole else "a number")
        least, most = (f"{end:,.10g}" if isinstance(end, float) else f"{end:,}" for end in (self.least, self.most))
        return f"{kind} above {least} and at most {most}" if self.open else f"{kind} from {least} to {most}"

    def holds(self, number: float) -> bool:
        """Tell whether the number may be given; NaN and infinity never."""
        inside = self.least < number <= self.most if self.open else self.least <= number <= self.most
        return inside and (not self.whole or number == int(number))


TOKENS, COUNT = 100_000_000, 1_000_000
LIMITS = {
    "active": Limit(0, 1, whole=False, open=True, hint="a share of the FFN, such as 0.5,"),
    "target_active": Limit(
        0, 1, whole=False, open=True, hint="a share of the model's own number of experts, such as 0.7,"
    ),
    "memory_factor": Limit(0.01, 64, whole=False),
    "expert_width": Limit(1, COUNT),
    "tokens": Limit(1, TOKENS),
    "window": Limit(2, COUNT),
    "first_tokens": Limit(0, TOKENS),
    "image_weight": Limit(0, 1_000, whole=False, open=True),
    "held_out_tokens": Limit(1, TOKENS),
    "max_tokens": Limit(1, 10 * TOKENS),
    "items": Limit(1, TOKENS),
    "answer_tokens": Limit(1, COUNT),
    "seed": Limit(0, 2**32 - 1),
    "collapse_ratio": Limit(0, 1e9, whole=False, open=True),
    "samples": Limit(1, TOKENS),
    "steps": Limit(1, TOKENS),
    "minutes": Limit(0, 525_600, whole=False, open=True),
    "batch": Limit(1, 4_096),
    "learning_rate": Limit(0, 1, whole=False),
    "router_learning_rate": Limit(0, 1, whole=False),
    "warmup": Limit(0, 1, whole=False),
    "cache_bias": Limit(0, 1, whole=False, hint="a share of the range of a token's scores, such as 0.3,"),
    "top_k": Limit(1, COUNT),
    "match": Limit(0, 1e6, whole=False),
    "balance_step": Limit(0, 1, whole=False, open=True),
    "balance_weight": Limit(0, 1e6, whole=False, open=True),
    "locality": Limit(0, 1e3, whole=False),
    "held_out": Limit(1, COUNT),
    "evaluations": Limit(1, COUNT),
    "patience": Limit(1, COUNT),
    "rank": Limit(1, 16_384),
    "alpha": Limit(1, COUNT),
    "width": Limit(1, 65_536),
    "prompt": Limit(2, COUNT),
    "new": Limit(1, COUNT),
    "requests": Limit(1, COUNT),
    "rounds": Limit(1, 10_000),
    "max_new_tokens": Limit(1, COUNT),
    "reference_tokens": Limit(1, COUNT),
    "temperature": Limit(0, 100, whole=False),
    "experts": Limit(1, COUNT),
    "ratio": Limit(0, 1, whole=False),
    "layers": Limit(1, COUNT),
}
"""By the name of the setting: on the command line `--memory-factor`, in recipes and Python `memory_factor`."""
OPTION = Limit(-TOKENS, TOKENS, whole=False)
"""What an option of a method may be that has no limit of its own."""
COLDEST = 0.01
"""A temperature below that, but for 0, overflows half precision."""


def file_to_write(option: str, file: Path) -> Path:
    """Check that a file can be written at a path; returns where a link leads, so that the link stays one.

    Raises:
        InputError: no such folder, or something else than a file is there.
    """
    if not file.absolute().parent.is_dir():
        raise InputError(f"{option} {file}: there is no folder '{file.absolute().parent}'; make it first")
    if file.exists() and not file.is_file():
        raise InputError(f"{option} {file} is a folder or a device; name a file")
    return file.resolve() if file.is_symlink() else file


def check(**given: object) -> None:
    """Check that settings are numbers within `LIMITS`; None, which leaves a setting to its default, always is.

    Raises:
        InputError: one is not; the message has the value and the limits.
    """
    for name, value in given.items():
        if value is not None:
            number(name, value)


def number(name: str, value: object, limit: Limit | None = None) -> int | float:
    """Read a setting's number, which recipes may write as text (`1e-4` is text in YAML).

    Raises:
        InputError: it is not within `limit`, or that of `LIMITS`.
    """
    limit = limit or LIMITS[name]
    found = _read(value)
    if found is None or not limit.holds(found) or (name == "temperature" and 0 < found < COLDEST):
        expected = f"0, or {Limit(COLDEST, limit.most, whole=False)}" if name == "temperature" else str(limit)
        raise InputError(f"--{name.replace('_', '-')} is {shown(value)}; give {expected}")
    return int(found) if limit.whole else found


def _read(value: object) -> int | float | None:
    if isinstance(value, bool) or (not hasattr(value, "__float__") and not isinstance(value, str)):
        return None
    try:
        found = value if isinstance(value, int) else float(value)  # pyrefly: ignore[bad-argument-type]
    except (ValueError, TypeError, OverflowError):
        return None
    return found if isinstance(found, int) or math.isfinite(found) else None


def shown(value: object) -> str:
    """Show what was given, cut where it is long, nested or refers to itself."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 60, 60
    return short.repr(value)


def path(given: str | Path) -> Path:
    """Make a path of what was given, `~` expanded.

    Raises:
        InputError: no such home folder, or a name that is not UTF-8.
    """
    try:
        return Path(text(str(given), "the path")).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"'{given}': there is no such home folder; write the whole path, or ./~... for a name"
        ) from error


def optional_path(given: str | Path | None) -> Path | None:
    """Make a path, or None of none.

    Raises:
        InputError: as `path`.
    """
    return None if given is None else path(given)


def place(given: str) -> str:
    """Expand `~` in what may be a path or another name: a model, a text, a dataset.

    Raises:
        InputError: as `path`.
    """
    return str(path(given)) if given.startswith("~") else text(given, "the name")


def text(given: str, what: str) -> str:
    """Return a text that is Unicode and holds no NUL.

    Raises:
        InputError: it holds bytes that were not UTF-8 (lone surrogates), or NUL.
    """
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} {shown(given)} is not UTF-8 text; write it in UTF-8") from error
    if "\0" in given:
        raise InputError(f"{what} {shown(given)} holds a NUL byte; drop it")
    return given
