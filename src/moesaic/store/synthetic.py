"""Route traces of models that are not there: routes drawn so that they repeat as measured ones do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .replay import LayerStep
from .routes import DECODE, Pass


@dataclass(frozen=True, kw_only=True)
class Routes:
    """How a model's routes repeat: a token's experts are the k largest of `popularity + drift + chance`.

    Popularity is a normal draw for each expert, drift an AR(1) process over tokens (the topic), chance a Gumbel draw
    for each token. The defaults repeat as BigMoeOnEdge's trace of Qwen3-30B does (k 6 of 128, 128 tokens). There and
    here neighbours share 38 and 37 % of their experts, tokens eight apart 27 and 29 %, and the six experts used most in
    a layer carry 38 and 38 % of its uses.
    """

    num_layers: int
    num_experts: int
    experts_per_token: int
    popularity: float = 2.0
    """Standard deviation."""
    drift: float = 1.5
    """Standard deviation."""
    memory: float = 0.93
    """Share of the drift that the next token keeps."""
    seed: int = 0

    def request(self, tokens: int, number: int = 0) -> list[Pass]:
        """Draw the decode of one request; popularity is the model's, so the same in all of them."""
        popular_LE = np.random.default_rng(self.seed).normal(0, self.popularity, (self.num_layers, self.num_experts))
        chance = np.random.default_rng((self.seed, number, 1))
        drift_LE = chance.normal(0, self.drift, popular_LE.shape)
        fresh = self.drift * (1 - self.memory**2) ** 0.5
        found = []
        for _ in range(tokens):
            score_LE = popular_LE + drift_LE + chance.gumbel(size=popular_LE.shape)
            chosen_LK = np.argpartition(-score_LE, self.experts_per_token - 1)[:, : self.experts_per_token]
            steps = tuple(LayerStep(layer, tuple(sorted(row))) for layer, row in enumerate(chosen_LK.tolist()))
            found.append(Pass(DECODE, 1, steps))
            drift_LE = self.memory * drift_LE + chance.normal(0, fresh, popular_LE.shape)
        return found
