"""moesaic turns a dense language model into a Mixture-of-Experts, without training.

import moesaic
metrics = moesaic.convert("tiny", "out", moesaic.ConvertConfig(active=0.5))
model, tokenizer = moesaic.load("out")
"""

__version__ = "0.1.0"

from .config import ConvertConfig
from .conversion.convert import convert
from .conversion.plans import plans
from .errors import InputError, WorkError
from .evaluation.benchmark import benchmark
from .evaluation.evaluate import evaluate
from .evaluation.inspect import inspect
from .formats.export import export
from .formats.loading import load
from .moe.kernels import register as _register_experts
from .moe.modeling import register as _register_models
from .plan import Plan
from .serving.generate import complete
from .training.config import FinetuneConfig
from .training.finetune import finetune

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
