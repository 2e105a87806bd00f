"""The processor in a vision-language model's folder: pictures and text in, out what the model is called with."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from ..compat import require
from ..errors import InputError, first_line
from .families import takes_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

FILES = ("*processor_config.json", "chat_template*")
"""What a processor consists of, beside the tokenizer."""
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")
WHITE = 65_535
"""Of grey values of 16 bits."""
ADDRESS = re.compile(r"(?P<scheme>https?|ftp|s3|hf):/+(?P<rest>.+)")


class Processor:
    """What makes a model's inputs of text and pictures.

    Args:
        folder: the model's.
        config: the model's.

    Raises:
        InputError: the model takes text only, Pillow is not installed, or there is no processor that transformers can
            read.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        check_takes_pictures(config, folder)
        require("reading pictures", "vision", "PIL")
        try:
            self.own: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many unrelated types for what a file may hold
            raise InputError(
                f"no usable processor in '{folder}' ({first_line(error)}); put the model's processor files there, or "
                "install what it asks for (of many: pip install torchvision)"
            ) from error
        self.tokenizer: PreTrainedTokenizerBase = getattr(self.own, "tokenizer", self.own)
        self.image_token_id: int = image_token_id(config)
        self.has_template = bool(getattr(self.own, "chat_template", None) or self.tokenizer.chat_template)
        if getattr(self.own, "image_processor", None) is None:
            raise InputError(
                f"'{folder}' has a tokenizer and no image processor; put the model's processor files there"
            )

    @property
    def chat_template(self) -> object:
        """The chat template, or something empty; named as tokenizers name it."""
        return self.has_template

    def apply_chat_template(self, turns: Sequence[dict[str, object]], **arguments: object) -> str:
        """Write a chat as text, with the mark of a picture in each place for one."""
        return self.own.apply_chat_template([as_parts(turn) for turn in turns], **arguments)

    @property
    def mark(self) -> str:
        """What stands for a picture in a text."""
        return self.own.image_token

    def inputs(self, text: str, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """Make what the model is called with for one text, a batch of one.

        Raises:
            InputError: another number of pictures than of marks in the text, or pictures that cannot be used.
        """
        places = text.count(self.mark)
        if places != len(pictures):
            raise InputError(
                f"the text has {places} place{'s' * (places != 1)} for pictures ({self.mark}) and {len(pictures)} "
                "picture(s) come with it; give as many"
            )
        given = {"images": list(pictures)} if pictures else {}
        try:
            made = self.own(text=[text], return_tensors="pt", **given)
        except Exception as error:  # processors raise many unrelated types for what a picture may be
            raise InputError(f"the model's processor refuses the pictures: {first_line(error)}") from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def as_parts(turn: dict[str, object]) -> dict[str, object]:
    """Write a turn's content as a list of parts, which processors' templates go through."""
    content = turn["content"]
    return turn if isinstance(content, list) else turn | {"content": [{"type": "text", "text": content}]}


def image_token_id(config: PreTrainedConfig) -> int:
    """Find the token that stands for a part of a picture.

    Raises:
        InputError: the configuration names none.
    """
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise InputError(
        f"the configuration of this {config.model_type} model names no token for pictures (image_token_id); models "
        "that take them in another way are not understood"
    )


def check_takes_pictures(config: PreTrainedConfig, name: str | Path) -> None:
    """Check that a model takes more than text.

    Raises:
        InputError: it does not.
    """
    if not takes_pictures(config):
        raise InputError(
            f"'{name}' is a {config.model_type} model, which takes text only; leave the pictures out, or give a "
            "vision-language model"
        )


def check_picture(path: Path, where: str = "") -> None:
    """Check that a file is there and may be a picture, without reading it.

    Args:
        path: the file.
        where: the file and line that name it, for errors; nothing: a user's own words do.

    Raises:
        InputError: there is no such file, or it is a video or an address.
    """
    before, after = (
        (f"{where}: ", "names are relative to the file that has them") if where else ("", "give one that is")
    )
    if address := ADDRESS.match(path.as_posix()):
        url = f"{address['scheme']}://{address['rest']}"
        raise InputError(f"{before}'{url}' is an address; pictures are read from files: download it, and give its file")
    if path.suffix.lower() in VIDEOS:
        raise InputError(f"{before}'{path}' is a video; videos are not read: give single pictures")
    if not path.is_file():
        raise InputError(f"{before}no picture '{path}'; {after}")


def open_picture(path: Path, where: str = "") -> Image:
    """Read a picture's pixels, in RGB, as a camera's note says turned upright.

    Args:
        path: its file.
        where: what names it, for errors.

    Raises:
        InputError: there is no such file, it is a video, no picture, or a damaged one.
    """
    require("reading pictures", "vision", "PIL")
    from PIL import Image, ImageOps

    before = f"{where}: " if where else ""
    check_picture(path, where)
    try:
        with Image.open(path) as picture:
            return in_eight_bits(ImageOps.exif_transpose(picture)).convert("RGB")
    except Exception as error:  # Pillow raises many unrelated types for what a file may hold
        raise InputError(
            f"{before}'{path}' is no picture that can be read ({first_line(error)}); give a whole .png or .jpg"
        ) from error


def in_eight_bits(picture: Image) -> Image:
    """Scale grey values of 16 bits to 8, which Pillow would cut off at 255; other pictures stay as they are.

    Raises:
        ValueError: values of 32 bits, whose white is anywhere.
    """
    from PIL import Image

    if picture.mode[0] not in "IF":
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > WHITE:
        raise ValueError("it holds numbers of 32 bits")
    return Image.fromarray((values // (WHITE // 255)).astype(np.uint8))


def copy_processor(source: Path, made: Path) -> None:
    """Copy the processor's files, which a converted model shares with the dense one."""
    for pattern in FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, made / path.name)
