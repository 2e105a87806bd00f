"""The dense model as a teacher: it runs once over each sequence, and its largest logits are kept on disk.

Shapes: N sequences, L tokens in one, V vocabulary, K logits kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.claim import LOCK
from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..errors import InputError
from ..files import write_whole
from ..formats.base import MoesaicModelConfig
from ..models.tokenizer import load_tokenizer
from ..serving.loading import load
from .data import Samples
from .losses import CHUNK


class Teacher:
    """A dense model, loaded when it is first needed, and its top log-probabilities by sequence.

    Raises:
        InputError: no such model, or one with another vocabulary.
    """

    def __init__(
        self,
        name: str,
        student: MoesaicModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        top_k: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.source, self.device, self.dtype = name, resolve(name), device, dtype
        self.top_k = min(top_k, student.vocab_size)
        self.checkpoint = Checkpoint(self.source)
        size = self.field("vocab_size")
        own = load_tokenizer(self.source)
        if size != student.vocab_size or own.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"the teacher '{name}' has another vocabulary ({size} logits, {len(own)} tokens) than the model "
                f"({student.vocab_size}, {len(tokenizer)}); give the dense model that it was converted from, or "
                "--objective lm"
            )
        self.folder = Path()
        self._model: PreTrainedModel | None = None

    def field(self, name: str) -> object:
        """Read a field of the teacher's configuration, or of its text part's."""
        config = self.checkpoint.config
        return (config | (config.get("text_config") or {})).get(name)

    def check_layers(self, student: MoesaicModelConfig) -> None:
        """Check that each layer has its like in the student.

        Raises:
            InputError: layers are of another number or width.
        """
        for field in ("num_hidden_layers", "hidden_size"):
            own, wanted = self.field(field), getattr(student, field)
            if own != wanted:
                raise InputError(
                    f"the teacher '{self.name}' has {field} {own}, the model {wanted}, so their layers cannot be "
                    "compared; give the dense model that it was converted from"
                )

    def keep_in(self, folder: Path, samples: Samples) -> None:
        """Keep log-probabilities there, apart from those of other teachers and of other sequences."""
        kept = f"{self.checkpoint.fingerprint()[:12]}-{samples.fingerprint()[:12]}-{self.top_k}"
        self.folder = folder / kept
        self.folder.mkdir(parents=True, exist_ok=True)

    def forget(self) -> None:
        """Free the model's memory; it is loaded again if it is asked for."""
        self._model = None

    @property
    def model(self) -> PreTrainedModel:
        """The dense model itself, in eval mode."""
        if self._model is None:
            self._model = load(self.source, device=self.device, dtype=self.dtype)[0].requires_grad_(False)
        return self._model

    def top(self, one: Samples) -> tuple[Tensor, Tensor]:
        """Find a sequence's `top_k` largest log-probabilities, float32 nats, and their tokens, [L, K] each."""
        [number], [tokens_L] = one.numbers, one.tokens_NL
        path = self.folder / f"{number:06d}.safetensors"
        found = self._kept(path, len(tokens_L))
        if found is None:
            inputs = one.inputs(self.device, self.dtype)
            log_probs_LK, tokens_LK = top_log_probs(self.model, tokens_L.to(self.device), self.top_k, inputs)
            kept = {"log_probs": log_probs_LK.half().cpu(), "tokens": tokens_LK.int().cpu()}
            with FileLock(self.folder / LOCK):  # processes share the folder
                write_whole(path, lambda writing: save_file(kept, writing))
            found = kept
        return found["log_probs"].to(self.device).float(), found["tokens"].to(self.device).long()

    def _kept(self, path: Path, length: int) -> dict[str, Tensor] | None:
        """Read what is kept of a sequence; None where nothing is, or something damaged, which is made again."""
        if not path.is_file():
            return None
        try:
            found = load_file(path)
            shapes = [tuple(found[name].shape) for name in ("log_probs", "tokens")]
        except Exception:  # safetensors raises its own type for every kind of damage
            return None
        return found if shapes == [(length, self.top_k)] * 2 else None

    @torch.no_grad()
    def hidden(self, tokens_NL: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Compute each layer's output, [N, L, D]; of the last one after the final norm, as transformers gives it."""
        output = self.model(input_ids=tokens_NL, **inputs, use_cache=False, output_hidden_states=True)
        return output.hidden_states[1:]


@torch.no_grad()
def top_log_probs(
    model: PreTrainedModel, tokens_L: Tensor, top_k: int, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Find the largest log-probabilities of every next token, nats, and which tokens those are, [L, K] each.

    `inputs` is what the model takes beside tokens, where the sequence has pictures.
    """
    logits_LV = model(input_ids=tokens_L[None], **inputs, use_cache=False).logits[0]
    top_LK = logits_LV.topk(top_k, dim=-1)
    total_L = torch.cat([part_CV.float().logsumexp(-1) for part_CV in logits_LV.split(CHUNK)])
    return top_LK.values.float() - total_L[:, None], top_LK.indices
