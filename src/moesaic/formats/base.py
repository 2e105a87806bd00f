"""The contract of a format: how a converted model is written, in moesaic's own architecture or in a stock one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

from .. import registry
from ..errors import InputError, WorkError
from ..models.devices import dtype_name
from ..models.families import ATTENTION
from ..results import Json
from .gguf_names import OUTSIDE_NAMES, RENAMED, ROPE_FACTORS, block_of, halved

Tensors = dict[str, Tensor]
"""A decoder layer's tensors by their name in the layer, e.g. `mlp.gate.weight`."""


GROUPED_BYTES = 16
"""Of which PyTorch's grouped products want each row of a matrix to be a multiple."""


class RopeParameters(TypedDict, total=False):
    """Rotary positions as transformers has them."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float
    factor: float
    original_max_position_embeddings: int


class MoesaicModelConfig(Protocol):
    """A converted model's transformers configuration: the dense family's fields, and those of the block."""

    dense_model_type: str
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    shared_expert_intermediate_size: int
    shared_expert_bias: bool
    router: str
    router_hidden_size: int
    pregate_groups: int
    pregate_heads: int
    mlp_only_layers: list[int] | None
    """Layers that keep their dense FFN."""
    norm_topk_prob: bool
    selection: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_parameters: RopeParameters
    layer_types: list[str] | None
    """Of families whose layers differ."""
    tie_word_embeddings: bool
    dtype: torch.dtype

    def to_dict(self) -> Json:
        """Write all fields."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json`."""
        ...


def block_config(whole: PreTrainedConfig) -> MoesaicModelConfig:
    """Find what says what the block is like: a configuration or, of a vision-language model, its language tower's."""
    return whole.get_text_config()  # pyrefly: ignore[bad-return]


class CopiedParameters(NamedTuple):
    """Parameters that a format holds beyond moesaic's own, those of copies of the shared expert."""

    total: int
    active: int
    """That one token runs."""


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """An architecture of stock transformers that holds a converted model, layer by layer and without loss.

    `moesaic_layer(layer(x)) == x`, bit by bit: all factors are powers of two.
    """

    selection_bias: ClassVar[bool] = False
    """Whether its router can add a constant to each expert's score, which serves the selection only."""
    mixes_dense: ClassVar[bool] = False
    """Whether some layers may keep their dense FFN."""
    routers: ClassVar[tuple[str, ...]] = ("linear",)
    """Kinds of gates that it can say."""
    sources: ClassVar[tuple[str, ...]] = ()
    """Model types of the dense families that it can hold."""
    loaded_by: ClassVar[tuple[str, ...]] = ()
    """Engines that have it: of `transformers`, `vllm`, `sglang`, `mlx`."""
    copies_shared: ClassVar[bool] = False
    """Whether each routed expert holds a copy of the shared one, for which the format has no place."""

    preference: ClassVar[int | None] = None
    """When `auto` tries the format, the least first; None: only when it is asked for."""
    gguf_architecture: ClassVar[str | None] = None
    """llama.cpp's name of the architecture; None if it has nothing that runs as transformers does."""

    gguf_interleaved: ClassVar[bool] = False
    """Whether llama.cpp turns neighbouring channels of queries and keys, where transformers turns halves."""

    model_type: ClassVar[str] = ""
    """In transformers; nothing where it is the file's name."""

    whole_model_type: ClassVar[str] = ""
    """Of the vision-language model whose language tower the format is; nothing where it stands for itself."""
    whole_architecture: ClassVar[str] = ""
    """The class of that."""

    @property
    def name(self) -> str:
        """The `model_type` in transformers."""
        return self.model_type or type(self).__module__.rpartition(".")[2]

    def gguf_layer(self, native: Tensors, config: MoesaicModelConfig) -> Tensors:
        """Name what is left of a layer's tensors, without attention and its norms, as llama.cpp does."""
        raise AssertionError(f"{self.name} has no GGUF")

    def native_layer(self, theirs: Tensors) -> Tensors:
        """Name what `gguf_layer` made as the stock architecture does: its inverse; takes the tensors out of `theirs`.

        Raises:
            InputError: the format does not read GGUF back.
        """
        raise InputError(f"{self.name} is not read back from GGUF; give the folder that the file was made from")

    def read_gguf(self, theirs: Tensors, config: Json) -> Tensors:
        """Name tensors of a GGUF, of one layer or of what is in none, as the stock architecture does.

        Args:
            theirs: by llama.cpp's names.
            config: `config.json` of the stock architecture.
        """
        if not any(name.startswith("blk.") for name in theirs):
            ours = {theirs_: ours for ours, theirs_ in OUTSIDE_NAMES.items()}
            return {ours[name]: tensor for name, tensor in theirs.items() if name != ROPE_FACTORS}
        prefix = block_of(next(iter(theirs))).prefix
        layer = {block_of(name).name: tensor for name, tensor in theirs.items()}
        stock = {ours: layer.pop(name) for ours, name in RENAMED.items() if name in layer}
        if self.gguf_interleaved:
            for n, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                name = f"{ATTENTION}.{n}_proj.weight"
                stock[name] = halved(stock[name], config[heads])
        stock |= self.native_layer(layer)
        if layer:
            raise ValueError(f"unknown tensors {', '.join(sorted(layer)[:3])}")
        return {prefix + name: tensor for name, tensor in stock.items()}

    def gguf_keys(self, writer: GGUFWriter, config: Json) -> None:
        """Write the keys of the architecture that are beyond those of any decoder; `config` is `config.json`'s."""
        return

    def expert_factor(self, config: MoesaicModelConfig) -> int:
        """Say what the routed experts' down-projections are multiplied by in this format."""
        return 1

    def engines(self, config: MoesaicModelConfig) -> list[str]:
        """List those of `loaded_by` that run this model rightly; MLX scales rope for none of these architectures."""
        return [e for e in self.loaded_by if e != "mlx" or config.rope_parameters["rope_type"] == "default"]

    def copied_parameters(self, config: MoesaicModelConfig) -> CopiedParameters:
        """Count the parameters of copies of the shared expert."""
        if not self.copies_shared:
            return CopiedParameters(0, 0)
        layers = config.num_hidden_layers - len(config.mlp_only_layers or ())
        shared = 3 * config.hidden_size * config.shared_expert_intermediate_size * layers
        return CopiedParameters(shared * (config.num_experts - 1), shared * (config.num_experts_per_tok - 1))

    def width_reason(self, config: MoesaicModelConfig) -> str:
        """Say why stock engines cannot run experts of that width; nothing if they can. llama.cpp runs any."""
        dtype = dtype_name(config.dtype or torch.float32)
        step = GROUPED_BYTES // getattr(torch, dtype).itemsize
        for what, width in (("an expert's", config.moe_intermediate_size), ("the hidden state's", config.hidden_size)):
            if width % step:
                return (
                    f"stock engines run experts in products whose widths are multiples of {step} in {dtype}, and "
                    f"{what} is {width}"
                )
        return ""

    @abstractmethod
    def reason_against(self, config: MoesaicModelConfig) -> str:
        """Say why the format cannot hold a model, whatever its weights are; nothing if it can."""

    def reason(self, config: MoesaicModelConfig, has_bias: bool) -> str:
        """Say why the format cannot hold a model whose routers add a constant to each score, or do not."""
        if config.mlp_only_layers and not self.mixes_dense:
            return "every layer of it is a Mixture of Experts, and of this model some are dense (--dense-layers)"
        against = self.reason_against(config)
        if not against and has_bias and not self.selection_bias:
            return (
                "its router adds a constant to each expert's score; convert with --partition specialists or --router "
                "linear:intercept=False"
            )
        return against

    def check(self, config: MoesaicModelConfig, has_bias: bool) -> None:
        """Check that the format can hold the model.

        Raises:
            InputError: it cannot; the message says why.
        """
        if reason := self.reason(config, has_bias) or self.width_reason(config):
            raise InputError(
                f"this model cannot be written as {self.name}: {reason}. With --format moesaic it runs everywhere that "
                "transformers does"
            )

    @abstractmethod
    def config_json(self, config: MoesaicModelConfig) -> Json:
        """Write what `config.json` says of a model that the format can hold."""

    @abstractmethod
    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        """Turn a decoder layer of moesaic's own format into this one."""

    def layer_exactly(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        """Turn a layer into this format, having seen that it can be undone bit by bit.

        Raises:
            WorkError: it cannot, as when a factor makes a weight too small for its dtype.
        """
        stock = self.layer(tensors, config)
        back = self.moesaic_layer(stock, config)
        lost = [
            n for n, t in tensors.items() if not (n in back and back[n].dtype == t.dtype and torch.equal(back[n], t))
        ]
        if lost:
            raise WorkError(f"{self.name} does not hold {lost[0]} without loss; use --format moesaic")
        return stock

    @abstractmethod
    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        """Turn a decoder layer of this format back into moesaic's own: the inverse of `layer`."""


def all_formats() -> list[Format]:
    """List every format, those first that `auto` tries first."""
    found: list[Format] = [registry.build("format", name) for name in registry.names("format")]
    return sorted(found, key=lambda format: (format.preference is None, format.preference or 0))
