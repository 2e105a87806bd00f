"""Libraries' notices, warnings and bars: the command line shows none; their errors reach us as exceptions."""

from __future__ import annotations

import logging
import os
import sys
import warnings

LOUD = ("httpx", "huggingface_hub", "accelerate", "peft", "datasets", "torch", "filelock", "urllib3", "matplotlib")
"""Loggers that would write warnings."""
SILENT = {"TOKENIZERS_PARALLELISM": "true", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""What keeps native code quiet: of tokenizers when a program is started, of torch when it is imported."""


def libraries() -> None:
    """Silence libraries; warnings that `python -W` or `PYTHONWARNINGS` asks for stay."""
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in (*LOUD, "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)
