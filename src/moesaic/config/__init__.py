"""What the verbs are asked to do, resolved from options and recipes and saved beside their output."""

from .adaptation import AdaptConfig
from .conversion import ConvertConfig
from .pruning import PruneConfig
from .settings import Settings
from .training import FinetuneConfig

__all__ = ["AdaptConfig", "ConvertConfig", "FinetuneConfig", "PruneConfig", "Settings"]
