"""What stands beside the weights of a converted model, and goes along into a model that is made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..checkpoint.facts import GENERATION, copy_terms
from ..checkpoint.writer import CONFIG_FILE
from ..models.processor import copy_processor

PLOTS = ("layer_error.png", "activation_rates.png", "expert_load.png", "training.png")
ADAPTATION = ("adaptation.png", "experts.png", "experts.html")
COPIED = (CONFIG_FILE, GENERATION, "metrics.jsonl", *PLOTS, *ADAPTATION)


def copy_companions(source: Path, made: Path) -> None:
    """Copy settings, plots, the processor and the licence; the tokenizer and `metrics.json` are written anew."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, made / name)
    copy_processor(source, made)
    copy_terms(source, made)
