"""Masks from scores that are given: the leaves themselves say what each weight is worth."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.prune.score import ScoreMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Highest(ScoreMethod):
    """Keeps the highest entries, for a tree of scores in place of weights, such as that of `effjax.prune.snip`.

    Example:
        >>> import effjax as ej
        >>> ej.prune_mask({"kernel": jnp.array([[-3.0], [1.0]])}, Highest(sparsity=0.5))["kernel"].tolist()
        [[False], [True]]
    """

    def scores(self, w: jax.Array, *, stats: Any, key: Any) -> jax.Array:
        return w.astype(jnp.float32)
