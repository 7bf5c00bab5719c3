"""Which weights may be chosen together: single ones, n of every m inputs, or blocks."""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import LeafError


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Unstructured (neither given), n:m (keep n of m consecutive inputs), or blocks of `rows x columns`.

    Attributes:
        n, m: kept inputs of every m, or None.
        block: rows (inputs) and columns (outputs) of a block, or None.
    """

    n: int | None = None
    m: int | None = None
    block: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: "str | Pattern | None") -> "Pattern":
        """Reads "2:4", "16x16" or None.

        Raises:
            ValueError: anything else.
        """
        if isinstance(text, Pattern):
            return text
        if text is None:
            return cls()
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = map(int, found.groups())
            if 1 <= n < m <= 256:
                return cls(n=n, m=m)
        elif found := re.fullmatch(r"(\d+)x(\d+)", text):
            rows, columns = map(int, found.groups())
            if rows and columns:
                return cls(block=(rows, columns))
        raise ValueError(f"pattern={text!r}: write 'n:m' with n < m <= 256, 'rowsxcolumns', or None for single weights")

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises LeafError when a weight `[*L, in, out]` cannot be cut so."""
        n, out = shape[-2:]
        if self.m is not None and n % self.m:
            raise LeafError(
                f"pattern {self.n}:{self.m} needs inputs divisible by {self.m}, not {n}: choose another for it"
            )
        if self.block is not None and (n % self.block[0] or out % self.block[1]):
            rows, columns = self.block
            raise LeafError(f"blocks of {rows}x{columns} do not divide a matrix of {n}x{out}: choose others for it")

    def unit_scores(self, scores: Float[Array, "*L in out"]) -> Float[Array, "*L rows columns"]:
        """One score for each unit that is kept or dropped as a whole (the mean over a block)."""
        if self.block is None:
            return scores
        rows, columns = self.block
        *lead, n, out = scores.shape
        return scores.reshape(*lead, n // rows, rows, out // columns, columns).mean((-3, -1))

    def expand(self, units: Bool[Array, "*L rows columns"]) -> Bool[Array, "*L in out"]:
        """The mask of single weights for a mask of units."""
        if self.block is None:
            return units
        return jnp.repeat(jnp.repeat(units, self.block[0], axis=-2), self.block[1], axis=-1)

    def keep_n_of_m(self, scores: Float[Array, "*L in out"]) -> Bool[Array, "*L in out"]:
        """The n highest of every m consecutive inputs; ties go to the first."""
        assert self.n is not None and self.m is not None  # other patterns keep units
        *lead, rows, out = scores.shape
        groups = scores.reshape(*lead, rows // self.m, self.m, out)
        order = jnp.argsort(-groups, axis=-2, stable=True)
        rank = jnp.argsort(order, axis=-2)
        return (rank < self.n).reshape(scores.shape)


def keep_highest(scores: jax.Array, kept: int) -> jax.Array:
    """A mask of exactly `kept` entries of a flat array: the highest, ties to the first."""
    order = jnp.argsort(-scores, stable=True)
    return jnp.zeros(scores.shape, bool).at[order[:kept]].set(True)
