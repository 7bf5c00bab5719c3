"""CountSketch: a table much smaller than a vector, from which each entry is estimated without bias."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

from effjax.hashing.integers import MultiplyShift, to_range


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CountSketch:
    """`depth` rows of `width` sums of entries with random signs (Charikar, Chen and Farach-Colton 2002).

    The estimate of one row has no bias and a variance of at most `|f|**2 / width`; the median of the rows is off by
    more than a few times its root with a probability that falls exponentially with `depth`.

    Attributes:
        table: `float32[depth, width]`. Tables with the same hashes add up: `jax.lax.psum` of it merges over devices.
        cells: the hashes to columns, a function a row.
        signs: the hashes to signs, a function a row.

    Example:
        >>> sketch = CountSketch.make(jax.random.key(0), depth=5, width=64)
        >>> sketch = sketch.update(jnp.array([3, 7], jnp.uint32), jnp.array([1.0, -2.0]))
        >>> sketch.query(jnp.array([3, 7], jnp.uint32)).tolist()
        [1.0, -2.0]
    """

    table: Shaped[Array, "depth width"]
    cells: MultiplyShift
    signs: MultiplyShift

    @classmethod
    def make(cls, key: jax.Array, *, depth: int, width: int) -> "CountSketch":
        """An empty sketch.

        Raises:
            ValueError: `depth` or `width` is below 1.
        """
        if depth < 1 or width < 1:
            raise ValueError(f"depth={depth}, width={width}: at least 1 row and 1 column")
        for_cells, for_signs = jax.random.split(key)
        return cls(
            table=jnp.zeros((depth, width)),
            cells=MultiplyShift.make(for_cells, functions=(depth,)),
            signs=MultiplyShift.make(for_signs, functions=(depth,)),
        )

    def _places(self, keys: UInt32[Array, " n"]) -> tuple[Array, Array, Array]:
        depth, width = self.table.shape
        sign = 1.0 - 2.0 * (self.signs(keys) >> 31).astype(jnp.float32)
        return jnp.arange(depth), to_range(self.cells(keys), width), sign

    def update(self, keys: UInt32[Array, " n"], values: Float[Array, " n"]) -> "CountSketch":
        """Adds `values` to the entries `keys`; a key may occur several times."""
        rows, cells, sign = self._places(keys)
        return dataclasses.replace(self, table=self.table.at[rows, cells].add(sign * values[:, None]))

    def query(self, keys: UInt32[Array, " n"]) -> Float[Array, " n"]:
        """The median over the rows of what each row says of the entries `keys`."""
        rows, cells, sign = self._places(keys)
        return jnp.median(sign * self.table[rows, cells], axis=-1)

    def merge(self, other: "CountSketch") -> "CountSketch":
        """The sketch of the sum of two vectors, both sketched with the same hashes.

        Raises:
            ValueError: the tables have different shapes.
        """
        if self.table.shape != other.table.shape:
            raise ValueError(
                f"tables of {self.table.shape} and {other.table.shape} do not add up: make both with one key"
            )
        return dataclasses.replace(self, table=self.table + other.table)
