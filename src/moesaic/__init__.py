"""moesaic turns a dense language model into a Mixture-of-Experts, without training.

import moesaic
metrics = moesaic.convert("tiny", "out", moesaic.ConvertConfig(active=0.5))
model, tokenizer = moesaic.load("out")
"""

__version__ = "0.1.0"

from .config import ConvertConfig, Plan
from .convert import convert
from .errors import InputError, WorkError
from .evaluation.benchmark import benchmark
from .evaluation.evaluate import evaluate
from .evaluation.generate import complete
from .evaluation.inspect import inspect
from .export.native import export
from .finetune import finetune
from .models.loading import load
from .models.working import register as _register_models
from .runtime.experts import register as _register_experts
from .shapes import plans
from .training.config import FinetuneConfig

_register_experts()
_register_models()

__all__ = [
    "ConvertConfig",
    "FinetuneConfig",
    "InputError",
    "Plan",
    "WorkError",
    "benchmark",
    "complete",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "plans",
]
