"""The tokenizer in a model's folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import InputError, first_line


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder.

    Raises:
        InputError: there is none, or transformers cannot read it.
    """
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # pyrefly: ignore[bad-assignment]
        return found
    except Exception as error:  # transformers and tokenizers raise many unrelated types for what a file may hold
        raise InputError(
            f"no usable tokenizer in '{folder}' ({first_line(error)}); put the model's tokenizer files there"
        ) from error
