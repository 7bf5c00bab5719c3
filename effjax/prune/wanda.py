"""Wanda: small weights of quiet inputs go, output by output."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from effjax.prune.score import ScoreMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(ScoreMethod):
    """Score `|W[i, o]| * ||x_i||` (Sun et al., A Simple and Effective Pruning Approach for LLMs, ICLR 2024, section 3).

    Weights compete within their output, as in the paper; other scopes are there to be compared with. Nothing is
    updated: `effjax.prune.repair` does that for this mask as for any other.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 2.0]])}
        >>> stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [jnp.array([[1.0, 4.0]])], needs={"norm"})
        >>> ej.prune_mask(params, Wanda(sparsity=0.5), stats=stats)["kernel"].tolist()
        [[False, False], [True, True]]
    """

    needs = frozenset({"norm"})

    scope: Literal["output", "leaf", "global"] = "output"

    def scores(self, w: jax.Array, *, stats: Any, key: Any) -> jax.Array:
        return jnp.abs(w.astype(jnp.float32)) * stats.norm[..., None]
