"""moesaic makes Mixture-of-Experts models cheap to get and cheap to run.

import moesaic
result = moesaic.convert("tiny", "out", moesaic.ConvertConfig(active=0.5))
model, tokenizer = moesaic.load("out")
"""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adaptation.adapt import adapt
    from .comparison.frontier import frontier
    from .comparison.quantised import compare_quantised
    from .comparison.rows import Measurement
    from .config import AdaptConfig, ConvertConfig, FinetuneConfig, PruneConfig
    from .config.describe import describe
    from .conversion.plans import plans
    from .effort import Estimate, convert, estimate
    from .errors import InputError, WorkError
    from .evaluation.benchmark import benchmark
    from .evaluation.evaluate import evaluate
    from .evaluation.experts import inspect_experts
    from .evaluation.inspect import inspect
    from .evaluation.oracle import inspect_oracle
    from .evaluation.routes import inspect_routes
    from .formats.export import export
    from .models.moe_block import MoEBlock, Routing, find_blocks, routed_by
    from .plan import Plan
    from .pruning.prune import prune
    from .serving.generate import complete
    from .serving.loading import load
    from .serving.questions import load_processor
    from .serving.server.serve import serve
    from .serving.server.settings import ServeConfig
    from .store.opening import StoreOptions
    from .training.finetune import finetune

PUBLIC = {
    "AdaptConfig": "config",
    "ConvertConfig": "config",
    "Estimate": "effort",
    "FinetuneConfig": "config",
    "InputError": "errors",
    "Measurement": "comparison.rows",
    "MoEBlock": "models.moe_block",
    "Plan": "plan",
    "PruneConfig": "config",
    "Routing": "models.moe_block",
    "StoreOptions": "store.opening",
    "ServeConfig": "serving.server.settings",
    "WorkError": "errors",
    "adapt": "adaptation.adapt",
    "benchmark": "evaluation.benchmark",
    "compare_quantised": "comparison.quantised",
    "complete": "serving.generate",
    "convert": "effort",
    "describe": "config.describe",
    "estimate": "effort",
    "evaluate": "evaluation.evaluate",
    "export": "formats.export",
    "find_blocks": "models.moe_block",
    "finetune": "training.finetune",
    "frontier": "comparison.frontier",
    "inspect": "evaluation.inspect",
    "inspect_experts": "evaluation.experts",
    "inspect_oracle": "evaluation.oracle",
    "inspect_routes": "evaluation.routes",
    "load": "serving.loading",
    "load_processor": "serving.questions",
    "plans": "conversion.plans",
    "prune": "pruning.prune",
    "routed_by": "models.moe_block",
    "serve": "serving.server.serve",
}
"""Public names and the modules that they are in, imported when they are first used (PEP 562)."""


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'moesaic' has no attribute '{name}'")
    found = getattr(importlib.import_module(f".{PUBLIC[name]}", __name__), name)
    globals()[name] = found
    return found


_is_command = PurePath(sys.argv[0]).stem == "moesaic" or "moesaic.cli" in sys.orig_argv
if not _is_command:  # the command line shows its help, and hears Ctrl-C, without waiting for torch
    from .moe import modeling as _registered  # noqa: F401  transformers' auto classes know our models from now on


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


__all__ = [
    "AdaptConfig",
    "ConvertConfig",
    "Estimate",
    "FinetuneConfig",
    "InputError",
    "Measurement",
    "MoEBlock",
    "Plan",
    "PruneConfig",
    "Routing",
    "ServeConfig",
    "StoreOptions",
    "WorkError",
    "adapt",
    "benchmark",
    "compare_quantised",
    "complete",
    "convert",
    "describe",
    "estimate",
    "evaluate",
    "export",
    "find_blocks",
    "finetune",
    "frontier",
    "inspect",
    "inspect_experts",
    "inspect_oracle",
    "inspect_routes",
    "load",
    "load_processor",
    "plans",
    "prune",
    "routed_by",
    "serve",
]
