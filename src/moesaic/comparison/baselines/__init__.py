"""What practitioners would pick in place of a conversion, one file a method, in the frontier's harness."""

from .base import Baseline, Request, UndefinedBudget
from .build import build

__all__ = ["Baseline", "Request", "UndefinedBudget", "build"]
