"""Magnitude pruning: the smallest weights go."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.prune.score import ScoreMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(ScoreMethod):
    """Score `|w|` (Han et al. 2015).

    Example:
        >>> import jax.numpy as jnp
        >>> Magnitude(pattern="1:2").mask(jnp.array([[3.0], [-4.0], [0.5], [0.1]])).ravel().tolist()
        [False, True, True, False]
    """

    def scores(self, w: jax.Array, *, stats: Any, key: Any) -> jax.Array:
        return jnp.abs(w.astype(jnp.float32))
