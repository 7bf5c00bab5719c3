"""RACE, repeated arrays of counts: sums of a kernel over all points ever added, in fixed memory and time."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Race:
    """Row `l` adds the weight of a point into the cell that hash `l` gives it; a query averages the cells it hits.

    The mean over the draw of the hashes is `sum_j w_j k(x_j, q)`, where `k` is the probability of a collision (Coleman
    and Shrivastava 2020). Codes come from `effjax.hashing.lsh`, so that they can be made once and kept. Everything is
    linear: sketches with the same hashes add up leaf by leaf, also as `jax.lax.psum(sketch, axis)`.

    Attributes:
        counts: `float32[rows, buckets, *outputs]`.
        total: `float32[*outputs]`, the sum of all weights.
        rehashed: codes were rehashed to the cells, so that points that do not collide share one in `1 / buckets` of
            the rows; queries take that out again.

    Example:
        >>> from effjax.hashing.lsh import PStable
        >>> lsh = PStable.make(jax.random.key(0), dim=2, rows=4000, hashes=1, width=1.0, buckets=8)
        >>> race = Race.make(rows=4000, buckets=8).add(lsh(jnp.array([[0.0, 0.0], [3.0, 4.0]])), jnp.array([1.0, 2.0]))
        >>> exact = lsh.kernel(jnp.array([0.0, 0.0]), jnp.array([[0.0, 0.0], [3.0, 4.0]])) @ jnp.array([1.0, 2.0])
        >>> bool(abs(race.query(lsh(jnp.zeros(2))) - exact) < 0.05)
        True
    """

    counts: Shaped[Array, "rows buckets *outputs"]
    total: Shaped[Array, "*outputs"]
    rehashed: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def make(cls, *, rows: int, buckets: int, outputs: tuple[int, ...] = (), rehashed: bool = True) -> "Race":
        """An empty sketch.

        Raises:
            ValueError: no row, or fewer than 2 buckets, which rehashing could not be corrected for.
        """
        if rows < 1 or buckets < 2:
            raise ValueError(f"rows={rows}, buckets={buckets}: at least 1 row and 2 buckets")
        return cls(counts=jnp.zeros((rows, buckets, *outputs)), total=jnp.zeros(outputs), rehashed=rehashed)

    def add(self, codes: Int32[Array, "n rows"], weights: Float[Array, "n *outputs"]) -> "Race":
        """Adds points; those of one call that share a cell accumulate."""
        rows = jnp.arange(self.counts.shape[0])
        counts = self.counts.at[rows, codes].add(weights[:, None].astype(self.counts.dtype))
        return dataclasses.replace(self, counts=counts, total=self.total + weights.sum(0))

    def query(self, codes: Int32[Array, "*batch rows"], *, groups: int | None = None) -> Float[Array, "..."]:
        """Sums of the kernel at the queries with these codes, `float32[*batch, *outputs]`.

        Args:
            codes: of the queries.
            groups: the median of the means of so many groups of rows, whose error falls exponentially with their
                number; None for the mean of all rows.

        Raises:
            ValueError: `groups` does not divide the rows.
        """
        rows = self.counts.shape[0]
        hit = jnp.moveaxis(self.counts[jnp.arange(rows), codes], codes.ndim - 1, 0)
        return corrected(grouped(hit, groups), self.total, self.counts.shape[1] if self.rehashed else None)

    def scaled(self, factor: float | Float[Array, ""]) -> "Race":
        """All weights times `factor`: called every step, exponential forgetting."""
        return dataclasses.replace(self, counts=self.counts * factor, total=self.total * factor)

    def merge(self, other: "Race") -> "Race":
        """The sketch of the points of both, hashed by the same functions.

        Raises:
            ValueError: the counts have different shapes.
        """
        if self.counts.shape != other.counts.shape or self.rehashed != other.rehashed:
            raise ValueError(
                f"counts of {self.counts.shape} and {other.counts.shape} do not add up: make both sketches for one hash"
            )
        return dataclasses.replace(self, counts=self.counts + other.counts, total=self.total + other.total)


def grouped(values: Float[Array, "rows *rest"], groups: int | None) -> Float[Array, "*rest"]:
    """The mean over the rows, or the median of the means of `groups` groups of consecutive rows."""
    if groups is None:
        return values.mean(0)
    check_groups(groups, values.shape[0])
    return jnp.median(values.reshape(groups, -1, *values.shape[1:]).mean(1), axis=0)


def check_groups(groups: int, rows: int) -> None:
    """Raises a ValueError where `groups` groups of rows would not be of one size."""
    if groups < 1 or rows % groups:
        raise ValueError(f"groups={groups} does not divide {rows} rows: choose a divisor, or None for the mean")


def corrected(mean: Float[Array, "..."], total: Float[Array, "..."], buckets: int | None) -> Float[Array, "..."]:
    """Takes out what rehashing to `buckets` cells adds: a point that does not collide shares a cell in `1 / buckets` of
    the rows, so that `mean = f + (total - f) / buckets`."""
    return mean if buckets is None else (mean - total / buckets) / (1 - 1 / buckets)
