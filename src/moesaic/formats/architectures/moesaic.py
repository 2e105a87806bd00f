"""moesaic's own format: what a stock architecture is read back into."""

from dataclasses import dataclass
from typing import ClassVar

from ...moe.modeling import MODEL_TYPE
from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors


@dataclass(frozen=True, kw_only=True)
class MoesaicFormat(Format):
    """Changes nothing."""

    selection_bias: ClassVar[bool] = True
    mixes_dense: ClassVar[bool] = True

    def reason_against(self, config: MoesaicModelConfig) -> str:
        return ""

    def width_reason(self, config: MoesaicModelConfig) -> str:
        return ""

    def config_json(self, config: MoesaicModelConfig) -> Json:
        return config.to_dict() | {"model_type": MODEL_TYPE}

    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        return tensors

    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        return tensors
