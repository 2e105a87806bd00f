"""The one model that is served, as transformers' serving app wants to know it."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

from ..schedulers import check_scheduler
from .batching import Batcher
from .settings import ServeConfig

PAGE = {"cpu": 32, "cuda": 256}
BATCH = {"cpu": 512, "cuda": 2_048}
CACHE = {"cpu": 16_384, "cuda": None}
"""Defaults by device: tokens of a page of the cache, of a batch, and of all requests in the cache."""


class OneModel(ModelManager):
    """A model that is loaded; no other is ever."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, batcher: Batcher) -> None:
        super().__init__(trust_remote_code=False, model_timeout=-1)
        self.model, self.tokenizer, self.name, self.batcher = model, tokenizer, name, batcher
        self.encoder: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
        """For `thread` alone: a tokenizer cannot encode on one thread while it decodes on another."""
        self.thread = ThreadPoolExecutor(1, "tokenizer")

    def load_model_and_processor(self, *args: object, **kwargs: object) -> tuple[object, object]:  # pyrefly: ignore[bad-override]
        return self.model, self.tokenizer

    def process_model_name(self, model_id: str) -> str:  # pyrefly: ignore[bad-override]
        return self.name

    def get_model_modality(self, *args: object, **kwargs: object) -> Modality:  # pyrefly: ignore[bad-override]
        return Modality.LLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # pyrefly: ignore[bad-override]
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "moesaic"}]

    def shutdown(self) -> None:
        self.batcher.stop()
        self.thread.shutdown(wait=False)


class OneBatcher(GenerationState):
    """The state that transformers' handlers share: one batcher, made before the first request."""

    def __init__(self, batcher: Batcher, config: ContinuousBatchingConfig) -> None:
        super().__init__(continuous_batching=True, cb_config=config)
        self.batcher = batcher

    def get_manager(self, model_id: str, use_cb: bool = True) -> Batcher:
        return self.batcher

    def is_cb_alive(self) -> bool:
        return self.batcher.is_alive()

    def shutdown(self) -> None:
        self.batcher.stop()


def batching_config(device: torch.device, config: ServeConfig) -> ContinuousBatchingConfig:
    """Size the batches and their cache.

    Sampling, schedulers and the experts of a batch are decided in Python between its steps, so there are no CUDA graphs
    and no batches prepared ahead.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    page = PAGE[kind]
    tokens = config.cache_tokens or CACHE[kind]
    return ContinuousBatchingConfig(
        scheduler_type=check_scheduler(config.scheduler),
        page_size=page,
        num_blocks=None if tokens is None else -(-tokens // page),
        max_batch_tokens=config.max_batch_tokens or BATCH[kind],
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,  # which would fetch its code from the hub
        drop_unsupported_processors=False,
    )
