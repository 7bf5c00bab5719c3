"""The best approximation of a weight by two thin factors, for the plain error or for the error on calibrated inputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.low_rank import LowRank as LowRankArray
from effjax.errors import LeafError
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Truncated singular value decomposition (Eckart and Young 1936), each factor carrying the root of the spectrum.

    Attributes:
        rank: rank of the product; or
        ratio: dense bytes over factor bytes, from which the rank follows; exactly one of the two.
        weighted: minimise the error of `x W` for calibrated second moments of `x` instead of the error of `W`
            (needs "second_moment").
        damping: share of the mean of the second moment's diagonal that is added to it, when weighted.

    Example:
        >>> import jax
        >>> w = jax.random.normal(jax.random.key(0), (32, 16))
        >>> LowRank(rank=4).compress(w).a.shape
        (32, 4)
    """

    rank: int | None = None
    ratio: float | None = None
    weighted: bool = False
    damping: float = 1e-2

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.ratio is None):
            raise ValueError(f"rank={self.rank}, ratio={self.ratio}: give exactly one of them")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: at least 1")
        if self.ratio is not None and self.ratio <= 0:
            raise ValueError(f"ratio={self.ratio}: a positive number")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"second_moment"}) if self.weighted else frozenset()

    sums = True

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank for a weight `[*L, in, out]`."""
        n, out = shape[-2:]
        if self.rank is not None:
            return self.rank
        assert self.ratio is not None  # one of the two is given
        return max(1, int(n * out / (self.ratio * (n + out))))

    def check(self, shape: tuple[int, ...]) -> None:
        limit = min(shape[-2:])
        if self.rank is not None and self.rank > limit:
            raise LeafError(f"rank={self.rank} is above the full rank {limit}: choose a smaller rank or a ratio")

    def compress(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> LowRankArray:
        rank = min(self.rank_of(w.shape), *w.shape[-2:])
        matrix = w.astype(jnp.float32)
        if self.weighted:
            root, inverse = _roots(stats.second_moment, self.damping)
            matrix = root @ matrix
        u, spectrum, v = jnp.linalg.svd(matrix, full_matrices=False)
        share = jnp.sqrt(spectrum[..., :rank])
        a = u[..., :, :rank] * share[..., None, :]
        if self.weighted:
            a = inverse @ a
        b = share[..., :, None] * v[..., :rank, :]
        return LowRankArray(a=a.astype(w.dtype), b=b.astype(w.dtype), dtype=w.dtype)


def _roots(moment: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """The symmetric square root of a second moment and its inverse; `|root (W - W')|` is the error of `x W`."""
    n = moment.shape[-1]
    mean = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / n
    values, vectors = jnp.linalg.eigh(moment + damping * mean * jnp.eye(n))
    values = jnp.sqrt(jnp.maximum(values, 1e-12))
    return (vectors * values[..., None, :]) @ vectors.mT, (vectors / values[..., None, :]) @ vectors.mT
