"""Random pruning: the baseline that every score must beat."""

import dataclasses
from typing import Any

import jax

from effjax.prune.score import ScoreMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(ScoreMethod):
    """Uniform random scores from the leaf's own key."""

    needs_key = True

    def scores(self, w: jax.Array, *, stats: Any, key: Any) -> jax.Array:
        return jax.random.uniform(key, w.shape)
