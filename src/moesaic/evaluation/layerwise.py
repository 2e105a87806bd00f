"""The perplexity of a model that is run layer by layer.

Shapes: N sequences, L tokens in one, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from ..models.integrity import check_numbers
from ..models.layerwise import LayerwiseModel
from ..results.evaluation import perplexity_of


def layerwise_perplexity(layerwise: LayerwiseModel, tokens_NL: Tensor, hidden_NLD: Tensor) -> float:
    """Compute `exp(mean loss)` of what leaves the last layer, at most e^700, which is a collapse.

    Raises:
        WorkError: logits are NaN or infinite.
    """
    loss = layerwise.token_losses(tokens_NL, hidden_NLD).mean().double()
    check_numbers({"the logits of held-out text": loss}, "after the last layer", layerwise.dtype)
    return perplexity_of(loss.item())
