"""What pruning methods by score share: sparsity, pattern, scope, and the choice that follows from the scores."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from effjax.prune.pattern import Pattern, keep_highest
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMethod(Method):
    """Keeps the weights of highest score.

    Attributes:
        sparsity: share of weights that become zero; for an n:m pattern it is `1 - n/m` and may be left out.
        pattern: None for single weights, "n:m", or "rowsxcolumns" for blocks (see `Pattern`).
        scope: "leaf" prunes every weight matrix (of every stacked layer) to the sparsity, "output" every column of it,
            "global" all selected leaves together, by comparing their scores.
    """

    sparsity: float | None = None
    pattern: str | None = None
    scope: Literal["output", "leaf", "global"] = "leaf"

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        if self.scope == "global" and Pattern.parse(self.pattern).m is not None:
            raise ValueError(f"pattern={self.pattern!r} fixes the sparsity of every leaf: use scope='leaf'")
        if self.scope not in ("output", "leaf", "global"):
            raise ValueError(f"scope={self.scope!r}: choose 'output', 'leaf' or 'global'")

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return Pattern.parse(self.pattern).block is not None

    def check(self, shape: tuple[int, ...]) -> None:
        Pattern.parse(self.pattern).check(shape)

    def scores(self, w: jax.Array, *, stats: Any, key: Any) -> jax.Array:
        """Importance of every weight, `float32[*L, in, out]`."""
        raise TypeError(f"{type(self).__name__} defines no scores")

    def mask(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> jax.Array:
        """True where a weight `[*L, in, out]` is kept."""
        pattern, scores = Pattern.parse(self.pattern), self.scores(w, stats=stats, key=key)
        if pattern.m is not None:
            return pattern.keep_n_of_m(scores)
        units = pattern.unit_scores(scores)
        flat = units.mT if self.scope == "output" else units.reshape(*w.shape[:-2], -1)
        kept = kept_of(flat.shape[-1], self.sparsity)
        keep = jnp.vectorize(lambda s: keep_highest(s, kept), signature="(n)->(n)")(flat)
        return pattern.expand(keep.mT if self.scope == "output" else keep.reshape(units.shape))


def check_sparsity(sparsity: float | None, pattern: str | None) -> None:
    """Raises ValueError where the two do not say together how much goes."""
    parsed = Pattern.parse(pattern)
    if parsed.n is not None and parsed.m is not None:
        if sparsity is not None and abs(sparsity - (1 - parsed.n / parsed.m)) > 1e-9:
            raise ValueError(f"sparsity={sparsity} contradicts pattern={pattern!r}: leave it out")
    elif sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: a share in [0, 1)")


def kept_of(size: int, sparsity: float | None) -> int:
    """How many of `size` units stay."""
    return size - round(size * (sparsity or 0.0))
