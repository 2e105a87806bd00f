"""One threshold for tokens of text and one for those of pictures; MoDES's observation (2511.15690): pictures need less.

Shapes: T tokens, N ranks of experts in a token's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from ...models.modality import IS_IMAGE
from .base import Counting, LayerSample, Parameters, Ranking, bisected


@dataclass(frozen=True, kw_only=True)
class ModalityThreshold(Counting):
    """`scores > threshold`, or `image_threshold` for tokens of pictures; for vision-language models only."""

    by_modality: ClassVar[bool] = True
    reaches_zero: ClassVar[bool] = True

    at_least: Annotated[int, Field(ge=0)] = 0
    threshold: float = 0.5
    """Threshold of scores for tokens of text; calibration sets it."""
    image_threshold: float = 0.5
    """Threshold of scores for tokens of pictures; calibration sets it."""
    image_share: Annotated[float, Field(gt=0)] = 0.75
    """Experts that a picture's token runs over those of a token of text, which calibration brings about."""

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        is_image_T = IS_IMAGE.get()
        if is_image_T is None or len(is_image_T) != len(hidden_TD):
            return ranking.scores_TN
        more = self.image_threshold - self.threshold
        return ranking.scores_TN - more * is_image_T.to(ranking.scores_TN.dtype)[:, None]

    def fit(self, layers: Sequence[LayerSample], mean: float) -> tuple[Self, list[Parameters]]:
        """Find both thresholds, at which `mean` experts run on average, and for pictures `image_share` as many."""
        scores, images = [layer.ranking.scores_TN for layer in layers], [layer.is_image_T for layer in layers]
        if any(image_T is None for image_T in images):
            return super().fit(layers, mean)
        is_image_T = images[0]
        assert is_image_T is not None
        share = is_image_T.double().mean().item()
        text = mean / (1 - share + share * self.image_share)
        limits = [
            self.level([score_TN[pick_T] for score_TN in scores], layers, wanted)
            for pick_T, wanted in ((~is_image_T, text), (is_image_T, text * self.image_share))
        ]
        return replace(self, threshold=limits[0], image_threshold=limits[1]), [s.parameters for s in layers]

    def level(self, scores: Sequence[Tensor], layers: Sequence[LayerSample], mean: float) -> float:
        """Find the threshold at which `mean` experts run on average over some tokens and all layers."""
        if not len(scores[0]):
            return self.threshold

        def runs_more(threshold: float) -> bool:
            counts = [
                self.within((score_TN > threshold).sum(-1), score_TN.shape[1], layer.default).double().mean()
                for score_TN, layer in zip(scores, layers, strict=True)
            ]
            return float(torch.stack(counts).mean()) > mean

        return sum(bisected(*self.bounds(scores), runs_more)) / 2
