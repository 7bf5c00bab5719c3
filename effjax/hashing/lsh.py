"""Locality-sensitive hashing: near vectors share a cell, with a probability that is a kernel of the two."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from effjax.hashing.integers import MultiplyShift, to_range

MOST_CODE = 2.0**30  # codes are clamped to it, so that an int32 holds them
_NEAREST = 1e-6  # of two vectors; the collision probability has no derivative where they are equal

Projections = Literal["gaussian", "sparse"]


def draw_directions(key: jax.Array, shape: tuple[int, ...], projections: Projections) -> Float[Array, "..."]:
    """Directions with entries of mean 0 and variance 1: Gaussian, or `sqrt(3)` times -1, 0, +1 with probabilities 1/6,
    2/3, 1/6, whose products are a third as many additions (Achlioptas 2003).

    The sparse ones behave as Gaussian ones where the vectors have many channels of about the same size.
    """
    if projections == "gaussian":
        return jax.random.normal(key, shape)
    if projections != "sparse":
        raise ValueError(f"projections={projections!r}: choose 'gaussian' or 'sparse'")
    drawn = jax.random.randint(key, shape, 0, 6)
    return math.sqrt(3.0) * ((drawn == 0).astype(jnp.float32) - (drawn == 1).astype(jnp.float32))


def euclidean_collision(distance: Float[Array, "..."], width: float, hashes: int = 1) -> Float[Array, "..."]:
    """The probability that `hashes` Gaussian projections, cut into intervals of `width`, all agree (Datar et al. 2004).

    With `u = width / distance`: `(1 - 2 Phi(-u) - 2 / (sqrt(2 pi) u) (1 - exp(-u**2 / 2))) ** hashes`.

    Example:
        >>> [f"{p:.3f}" for p in euclidean_collision(jnp.array([0.0, 1.0, 100.0]), 1.0)]
        ['1.000', '0.369', '0.004']
    """
    u = width / jnp.maximum(distance, _NEAREST * width)
    half = u * u / 2
    once = jax.lax.erf(u / math.sqrt(2)) + math.sqrt(2 / math.pi) * jnp.expm1(-half) / u
    return once**hashes


def angular_collision(angle: Float[Array, "..."], hashes: int = 1) -> Float[Array, "..."]:
    """The probability that `hashes` signs all agree: `(1 - angle / pi) ** hashes` (Charikar 2002)."""
    return (1 - angle / math.pi) ** hashes


def distance(x: Float[Array, "*x d"], y: Float[Array, "*y d"]) -> Float[Array, "..."]:
    """`|x - y|` along the last axis, with a gradient of zero where they are equal."""
    return jnp.sqrt(jnp.sum(jnp.square(x - y), -1) + _NEAREST**2)


def angle(x: Float[Array, "*x d"], y: Float[Array, "*y d"]) -> Float[Array, "..."]:
    """The angle between two vectors, exact for small ones, with a finite gradient where they are parallel."""
    x = x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + _NEAREST**2)
    y = y / jnp.sqrt(jnp.sum(y * y, -1, keepdims=True) + _NEAREST**2)
    return 2 * jnp.arctan2(distance(x, y), distance(x, -y))


def _checked(**options: int | float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: a positive number")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PStable:
    """Hashes for Euclidean distance: `hashes` intervals `floor(a . x / width + b)` a row, rehashed to `buckets` cells.

    Axes are ordered so that everything that a query reads lies row after row.

    Attributes:
        directions: `float32[dim, hashes, rows]`, the directions over `width`.
        offsets: `float32[hashes, rows]` in `[0, 1)`.
        rehash: a function a row.
        width: of the intervals.
        buckets: cells of a row.

    Example:
        >>> lsh = PStable.make(jax.random.key(0), dim=4, rows=100, hashes=2, width=2.0, buckets=16)
        >>> lsh(jnp.ones((7, 4))).shape, lsh(jnp.ones(4)).dtype
        ((7, 100), dtype('int32'))
    """

    directions: Shaped[Array, "dim hashes rows"]
    offsets: Shaped[Array, "hashes rows"]
    rehash: MultiplyShift
    width: float = dataclasses.field(metadata={"static": True})
    buckets: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def make(
        cls,
        key: jax.Array,
        *,
        dim: int,
        rows: int,
        hashes: int,
        width: float,
        buckets: int,
        projections: Projections = "gaussian",
    ) -> "PStable":
        """Draws `rows` independent functions.

        Raises:
            ValueError: a number that is not positive, or unknown `projections`.
        """
        _checked(dim=dim, rows=rows, hashes=hashes, width=width, buckets=buckets)
        for_directions, for_offsets, for_rehash = jax.random.split(key, 3)
        return cls(
            directions=draw_directions(for_directions, (dim, hashes, rows), projections) / width,
            offsets=jax.random.uniform(for_offsets, (hashes, rows)),
            rehash=MultiplyShift.make(for_rehash, functions=(rows,), words=hashes),
            width=width,
            buckets=buckets,
        )

    def codes(self, x: Float[Array, "*batch dim"]) -> Int32[Array, "*batch hashes rows"]:
        """The intervals, before they are rehashed."""
        at = jnp.tensordot(x.astype(jnp.float32), self.directions, 1) + self.offsets
        # A comparison with NaN is false: such a code is the lowest one, in the native kernel too.
        at = jnp.where(at >= -MOST_CODE, jnp.minimum(at, MOST_CODE), -MOST_CODE)
        return jnp.floor(at).astype(jnp.int32)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Int32[Array, "*batch rows"]:
        """The cell of each row, in `[0, buckets)`."""
        return to_range(self.rehash.of_words(_words(self.codes(x))), self.buckets)

    def kernel(self, x: Float[Array, "*x dim"], y: Float[Array, "*y dim"]) -> Float[Array, "..."]:
        """The probability that two vectors have the same codes in a row; they share a cell a little more often."""
        return euclidean_collision(distance(x, y), self.width, self.directions.shape[-2])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SignProjections:
    """Hashes for the angle (SimHash, Charikar 2002): the signs of `hashes` projections a row, as one number.

    Centre what is not negative before hashing it: all its angles are small, and everything collides.

    Attributes:
        directions: `float32[dim, hashes, rows]`.
        rehash: a function a row where the `2**hashes` codes are rehashed to fewer `buckets`; None where they are cells.
        buckets: cells of a row.

    Example:
        >>> lsh = SignProjections.make(jax.random.key(0), dim=4, rows=100, hashes=6)
        >>> lsh(jnp.ones((7, 4))).shape, lsh.buckets
        ((7, 100), 64)
    """

    directions: Shaped[Array, "dim hashes rows"]
    rehash: MultiplyShift | None
    buckets: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def make(
        cls,
        key: jax.Array,
        *,
        dim: int,
        rows: int,
        hashes: int,
        buckets: int | None = None,
        projections: Projections = "gaussian",
    ) -> "SignProjections":
        """Draws `rows` independent functions; without `buckets`, every code is a cell of its own.

        Raises:
            ValueError: a number that is not positive, more than 30 hashes without `buckets`, or unknown `projections`.
        """
        _checked(dim=dim, rows=rows, hashes=hashes, buckets=1 if buckets is None else buckets)
        if buckets is None and hashes > 30:
            raise ValueError(f"hashes={hashes}: a row would have 2**{hashes} cells; give buckets to rehash them")
        for_directions, for_rehash = jax.random.split(key)
        rehash = None if buckets is None else MultiplyShift.make(for_rehash, functions=(rows,), words=hashes)
        directions = draw_directions(for_directions, (dim, hashes, rows), projections)
        return cls(directions=directions, rehash=rehash, buckets=2**hashes if buckets is None else buckets)

    def codes(self, x: Float[Array, "*batch dim"]) -> Int32[Array, "*batch hashes rows"]:
        """One where a projection is at least zero, else zero."""
        return (jnp.tensordot(x.astype(jnp.float32), self.directions, 1) >= 0).astype(jnp.int32)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Int32[Array, "*batch rows"]:
        """The cell of each row, in `[0, buckets)`."""
        codes = self.codes(x)
        if self.rehash is not None:
            return to_range(self.rehash.of_words(_words(codes)), self.buckets)
        places = jnp.left_shift(jnp.int32(1), jnp.arange(codes.shape[-2], dtype=jnp.int32))
        return jnp.sum(codes * places[:, None], -2, dtype=jnp.int32)

    def kernel(self, x: Float[Array, "*x dim"], y: Float[Array, "*y dim"]) -> Float[Array, "..."]:
        """The probability that two vectors have the same codes in a row."""
        return angular_collision(angle(x, y), self.directions.shape[-2])


def _words(codes: Int32[Array, "*batch hashes rows"]) -> UInt32[Array, "*batch rows hashes"]:
    """Codes as words of a key: negative ones wrap around, the same at every call."""
    return jnp.moveaxis(codes, -2, -1).astype(jnp.uint32)
