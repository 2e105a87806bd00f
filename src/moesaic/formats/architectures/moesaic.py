"""The working form itself: what a native export is read back into."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Format, Tensors


@dataclass(frozen=True, kw_only=True)
class MoesaicFormat(Format):
    """Changes nothing."""

    selection_bias: ClassVar[bool] = True

    def config(self, working: Any) -> dict[str, Any]:
        return working.to_dict() | {"model_type": working.model_type}

    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        return tensors

    def moesaic_layer(self, tensors: Tensors, working: Any) -> Tensors:
        return tensors
