"""FAIR: embedding tables in nested random subspaces, so that devices of different sizes train one model together."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.hashing.integers import mix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
    """A random subspace of tables `[rows, features]`: cell `(i, j)` is `sign(i, j) * w[h(i, j) mod slots]`.

    Source: Federated averaging in random subspaces (Desai et al., arXiv 2311.01722). The hash depends on the seed and
    the cell alone, so that all devices agree on it (consistent), and spaces whose sizes divide each other are nested
    (collapsible). Nothing is stored but the seed. At ratio 1 the space is that of all tables, without a hash.

    Attributes:
        shape: rows and features of the table.
        ratio: cells a stored weight stands for; `max(floor(rows * features / ratio), 1)` weights are stored.
        seed: of the hash; each table of a model has its own.

    Example:
        >>> small = Subspace(shape=(100, 8), ratio=16)
        >>> large = Subspace(shape=(100, 8), ratio=4)
        >>> small.slots, large.slots, small.nests_in(large)
        (50, 200, True)
        >>> small.lookup(jnp.ones(50), jnp.array([3, 99])).shape
        (2, 8)
    """

    shape: tuple[int, int]
    ratio: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1 or math.prod(self.shape) >= 2**32:
            raise ValueError(f"shape={self.shape}: rows and features, at least 1 each and fewer than 2^32 cells")
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio}: at least 1 cell a stored weight")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: from 0 to 4294967295")

    @property
    def slots(self) -> int:
        """Stored weights."""
        return max(int(math.prod(self.shape) / self.ratio), 1)

    @property
    def whole(self) -> bool:
        """Whether every table is in the space."""
        return self.slots == math.prod(self.shape)

    def nests_in(self, larger: "Subspace") -> bool:
        """Whether every table of this space is one of `larger`."""
        same = (self.shape, self.seed) == (larger.shape, larger.seed)
        return larger.whole and self.shape == larger.shape or same and larger.slots % self.slots == 0

    def lookup(self, w: Float[Array, " slots"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """Rows `ids` of the table, reading only what they need; ids outside of the table are not checked."""
        if self.whole:
            return w.reshape(self.shape)[ids]
        slot, sign = self._cells(ids)
        return sign.astype(w.dtype) * w[slot]

    def expand(self, w: Float[Array, " slots"]) -> Float[Array, "rows features"]:
        """The whole table."""
        return self.lookup(w, jnp.arange(self.shape[0]))

    def compress(self, table: Float[Array, "rows features"]) -> Float[Array, " slots"]:
        """The nearest table of the space: a weight is the mean of its cells with their signs.

        The authors' code divides by the number of cells plus 1e-3 instead, which is no projection.

        Raises:
            ValueError: a table of another shape.
        """
        if table.shape != self.shape:
            raise ValueError(f"the table is {list(table.shape)}, the space one of tables {list(self.shape)}")
        if self.whole:
            return table.reshape(-1)
        slot, sign = self._cells(jnp.arange(self.shape[0]))
        return _mean(slot, sign * table.astype(jnp.float32), self.slots).astype(table.dtype)

    def collapse(self, w: Float[Array, " slots"], smaller: "Subspace") -> Float[Array, " smaller"]:
        """A vector of this space brought to a nested smaller one: `smaller.compress(self.expand(w))`.

        Buckets of this space are merged, weighted by their cells; the table itself is not made.

        Raises:
            ValueError: `smaller` is not nested in this space.
        """
        smaller.check_nested(self)
        if self.whole:
            return smaller.compress(w.reshape(self.shape))
        slot, _ = self._cells(jnp.arange(self.shape[0]))
        cells = jnp.zeros(self.slots).at[slot].add(1.0)
        bucket = jnp.arange(self.slots) % smaller.slots
        total = jnp.zeros(smaller.slots).at[bucket].add(cells * w.astype(jnp.float32))
        count = jnp.zeros(smaller.slots).at[bucket].add(cells)
        return (total / jnp.maximum(count, 1)).astype(w.dtype)

    def spread(self, w: Float[Array, " slots"], larger: "Subspace") -> Float[Array, " larger"]:
        """The same table as a vector of a larger space, exactly.

        Raises:
            ValueError: this space is not nested in `larger`.
        """
        self.check_nested(larger)
        return self.expand(w).reshape(-1) if larger.whole else w[jnp.arange(larger.slots) % self.slots]

    def check_nested(self, larger: "Subspace") -> None:
        """Raises ValueError, with the remedy, where this space is not nested in `larger`."""
        if not self.nests_in(larger):
            raise ValueError(
                f"{self} ({self.slots} weights) is not nested in {larger} ({larger.slots}): give both one shape and "
                "seed, and ratios such that the smaller number of weights divides the larger, such as powers of two of "
                "a table whose cells they divide"
            )

    def _cells(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slot `int32` and sign float32 of every cell of `rows`."""
        columns = jnp.arange(self.shape[1], dtype=jnp.uint32)
        cell = rows.astype(jnp.uint32)[..., None] * jnp.uint32(self.shape[1]) + columns
        hashed = mix(mix(jnp.uint32(self.seed)) ^ mix(cell))
        sign = mix(hashed + jnp.uint32(0x9E3779B9)) >> 31
        return (hashed % jnp.uint32(self.slots)).astype(jnp.int32), 1.0 - 2.0 * sign.astype(jnp.float32)


def average(
    server: Float[Array, " slots"],
    trained: Sequence[Float[Array, " _"]],
    spaces: Sequence[Subspace],
    weights: Sequence[float] | Float[Array, " devices"],
    *,
    space: Subspace,
    delta: bool = False,
) -> Float[Array, " slots"]:
    """One round of federated averaging in the space of the server.

    A device got `space.collapse(server, its own space)` and sent back what it trained, `its own space`.slots weights.

    Args:
        server: the vector of the server before the round.
        trained: what each device sent.
        spaces: the space of each device, nested in `space`.
        weights: share of each device, such as its number of interactions; they are divided by their sum.
        space: the space of the server.
        delta: add the weighted mean of the changes instead of taking that of the vectors (as the paper's code does).
            The plain mean includes projected copies of the table, so that what lies outside of the small spaces is
            multiplied by the share of the large devices in every round: large devices lose what they learned.

    Raises:
        ValueError: other numbers of vectors, spaces and weights; a space that is not nested.

    Example:
        >>> large, small = Subspace(shape=(4, 4)), Subspace(shape=(4, 4), ratio=4)
        >>> new = average(jnp.zeros(16), [jnp.ones(16), jnp.ones(4)], [large, small], [1, 1], space=large)
        >>> new.shape
        (16,)
    """
    if not len(trained) == len(spaces) == len(weights) or not len(trained):
        raise ValueError(
            f"{len(trained)} vectors, {len(spaces)} spaces, {len(weights)} weights: give one of each a device"
        )
    shares = jnp.asarray(weights, jnp.float32)
    shares = shares / shares.sum()
    result = server if delta else jnp.zeros_like(server)
    for w, own, share in zip(trained, spaces, shares, strict=True):
        change = w - space.collapse(server, own) if delta else w
        result = result + (share * own.spread(change, space)).astype(server.dtype)
    return result


def _mean(slot: jax.Array, values: jax.Array, slots: int) -> jax.Array:
    count = jnp.zeros(slots).at[slot].add(1.0)
    return jnp.zeros(slots).at[slot].add(values) / jnp.maximum(count, 1)
