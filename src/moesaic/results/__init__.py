"""What the verbs give back: frozen dataclasses whose fields are the keys of their JSON."""

from .adaptation import AdaptResult, AdaptStep
from .base import Json, Result
from .conversion import (
    Check,
    ConversionResult,
    Inspection,
    LaterChange,
    LayerRecord,
    PerplexityProtocol,
    PictureResult,
    PlanChoice,
    Plans,
    RouterLesson,
    Trial,
)
from .demo import DemoResult, LlamaCppSpeed, Typed
from .description import DescribedEntry, Description
from .evaluation import EvaluationResult, GenerationScore, TaskScore
from .experts import (
    CacheHits,
    ExpertGroup,
    ExpertsInspection,
    OracleInspection,
    Passage,
    PassageToken,
    RoutesInspection,
)
from .export import EngineChoice, ExportResult, WrittenGGUF
from .frontier import FrontierResult, FrontierRow, FrontierSibling, FrontierSummary, Placed, ShapeSpeed, SiblingSpeed
from .pruning import DepthResult, HealedLayer, PrunedLayer, PruningResult
from .serving import ServeResult
from .speed import BenchmarkResult, PictureSpeed, QuantisedResult, QuantisedRow, Rate, Roof, Speed
from .training import ExpertLoad, FinetuneResult, LoadChange, StepRecord

__all__ = [
    "AdaptResult",
    "AdaptStep",
    "BenchmarkResult",
    "CacheHits",
    "Check",
    "ConversionResult",
    "DemoResult",
    "DepthResult",
    "DescribedEntry",
    "Description",
    "EngineChoice",
    "EvaluationResult",
    "ExpertGroup",
    "ExpertLoad",
    "ExpertsInspection",
    "ExportResult",
    "FinetuneResult",
    "FrontierResult",
    "FrontierRow",
    "FrontierSibling",
    "FrontierSummary",
    "GenerationScore",
    "HealedLayer",
    "Inspection",
    "Json",
    "LaterChange",
    "LayerRecord",
    "LlamaCppSpeed",
    "LoadChange",
    "OracleInspection",
    "Passage",
    "PassageToken",
    "PerplexityProtocol",
    "PictureResult",
    "PictureSpeed",
    "Placed",
    "PlanChoice",
    "Plans",
    "PrunedLayer",
    "PruningResult",
    "QuantisedResult",
    "QuantisedRow",
    "Rate",
    "Result",
    "Roof",
    "RouterLesson",
    "RoutesInspection",
    "ServeResult",
    "ShapeSpeed",
    "SiblingSpeed",
    "Speed",
    "StepRecord",
    "TaskScore",
    "Trial",
    "Typed",
    "WrittenGGUF",
]
