"""What the verbs give back: frozen dataclasses whose fields are the keys of their JSON."""

from .adaptation import AdaptResult, AdaptStep
from .base import Json, Result
from .conversion import Check, ConversionResult, Inspection, LayerRecord, PerplexityProtocol, PlanChoice, Plans, Trial
from .demo import DemoResult, LlamaCppSpeed, Rate, Typed
from .evaluation import EvaluationResult, TaskScore
from .experts import ExpertGroup, ExpertsInspection, OracleInspection, Passage, PassageToken
from .export import ExportResult
from .frontier import FrontierResult, FrontierRow, FrontierSummary, ShapeSpeed
from .pruning import PrunedLayer, PruningResult
from .speed import BenchmarkResult, Roof, Speed
from .training import ExpertLoad, FinetuneResult, LoadChange

__all__ = [
    "AdaptResult",
    "AdaptStep",
    "BenchmarkResult",
    "Check",
    "ConversionResult",
    "DemoResult",
    "EvaluationResult",
    "ExpertGroup",
    "ExpertLoad",
    "ExpertsInspection",
    "ExportResult",
    "FinetuneResult",
    "FrontierResult",
    "FrontierRow",
    "FrontierSummary",
    "Inspection",
    "Json",
    "LayerRecord",
    "LlamaCppSpeed",
    "LoadChange",
    "OracleInspection",
    "Passage",
    "PassageToken",
    "PerplexityProtocol",
    "PlanChoice",
    "Plans",
    "PrunedLayer",
    "PruningResult",
    "Rate",
    "Result",
    "Roof",
    "ShapeSpeed",
    "Speed",
    "TaskScore",
    "Trial",
    "Typed",
]
