"""Bit streams read as 32-bit words in a vector register, and the order of inputs that spares an interleave.

The codes of a column are a stream of bits, least significant first (`effjax.arrays.packing`). Read as words of 32 bits,
`period_codes` codes fill `period_words` words, and code `c` of every period is had by a shift and a mask: a *plane*.
Planes are stacked instead of interleaved, and the inputs of the activations are brought to the same order once.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

SUBLANES = 8  # rows of a vector register of 32-bit numbers, so a plane has a multiple of them
LANES = 128


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream of codes of `bits` bits.

    Example:
        >>> Stream(4).period_codes, Stream(3).period_codes, Stream(3).period_words, Stream(3).step
        (8, 32, 3, 256)
    """

    bits: int

    @property
    def period_codes(self) -> int:
        return math.lcm(32, self.bits) // self.bits

    @property
    def period_words(self) -> int:
        return math.lcm(32, self.bits) // 32

    @property
    def step(self) -> int:
        """The fewest inputs whose planes fill whole registers; every span of inputs is a multiple of it."""
        return SUBLANES * self.period_codes

    def plane(self, words: list[Int32[Array, "periods out"]], code: int) -> Int32[Array, "periods out"]:
        """Code `code` of every period; `words[i]` are the i-th words of all periods."""
        word, shift = divmod(code * self.bits, 32)
        value = words[word] if shift == 0 else lax.shift_right_logical(words[word], jnp.int32(shift))
        if shift + self.bits > 32:
            value = value | lax.shift_left(words[word + 1], jnp.int32(32 - shift))
        return value if shift + self.bits == 32 else value & jnp.int32(2**self.bits - 1)

    def pair(self, words: list[Int32[Array, "periods out"]], code: int, at: int = 0) -> Int32[Array, "periods out"]:
        """Codes `code` and `code + period_codes / 2` of every period, at bit `at` of a word's low and high half."""
        mask = (2**self.bits - 1) << at
        first = code * self.bits
        second = first + 16 * self.period_words
        if self.period_words == 1:  # the second lies 16 bits after the first as it is
            return _shifted(words[0], at - first) & jnp.int32(mask | mask << 16)
        return self._at(words, first, at) | self._at(words, second, 16 + at)

    def _at(self, words: list[jax.Array], start: int, target: int) -> jax.Array:
        """The code that begins at bit `start`, moved to bit `target` of a word that is zero otherwise."""
        word, shift = divmod(start, 32)
        value = _shifted(words[word], target - shift)
        if shift + self.bits > 32:
            value = value | _shifted(words[word + 1], target - shift + 32)
        return value & jnp.int32((2**self.bits - 1) << target)


def _shifted(word: jax.Array, left: int) -> jax.Array:
    if left == 0:
        return word
    return lax.shift_left(word, jnp.int32(left)) if left > 0 else lax.shift_right_logical(word, jnp.int32(-left))


def to_planes(x: Float[Array, "rows in"], span: int, parts: tuple[int, ...], order: tuple[int, ...]) -> jax.Array:
    """Inputs in spans, each in the order of its planes: `[in / span, rows, span]`.

    Args:
        x: `in` a multiple of `span`.
        span: inputs that are unpacked together.
        parts: the factors of a span in the order of inputs, `(periods, ...)`.
        order: the same factors in the order of planes.

    Example:
        >>> to_planes(jnp.arange(6.0)[None], 6, (3, 2), (1, 0)).ravel().tolist()  # even inputs, then odd ones
        [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    """
    rows, n = x.shape
    split = x.reshape(rows, n // span, *parts)
    moved = jnp.transpose(split, (1, 0, *(2 + axis for axis in order)))
    return moved.reshape(n // span, rows, span)


def from_planes(y: Float[Array, "spans rows span"], parts: tuple[int, ...], order: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_planes`: `[rows, in]`.

    Example:
        >>> from_planes(to_planes(jnp.arange(6.0)[None], 6, (3, 2), (1, 0)), (3, 2), (1, 0)).ravel().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    spans, rows, span = y.shape
    split = y.reshape(spans, rows, *(parts[axis] for axis in order))
    inverse = [order.index(axis) for axis in range(len(order))]
    return jnp.transpose(split, (1, 0, *(2 + axis for axis in inverse))).reshape(rows, spans * span)


def pad_to(x: jax.Array, *multiples: int) -> jax.Array:
    """Zeros at the end of the last axes, up to a multiple in each.

    Example:
        >>> pad_to(jnp.ones((3, 5)), 8, 4).shape
        (8, 8)
    """
    lead = x.ndim - len(multiples)
    widths = [(0, 0)] * lead + [(0, -size % m) for size, m in zip(x.shape[lead:], multiples, strict=True)]
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def three_parts(x: Float[Array, "rows in"]) -> Float[Array, "three_rows in"]:
    """A float32 matrix as the sum of three bfloat16 ones, stacked: with weights exact in bfloat16 nothing is lost.

    Example:
        >>> x = jnp.array([[1.2345678]])
        >>> float(three_parts(x).astype(jnp.float32).sum()) == float(x[0, 0])
        True
    """
    parts = []
    rest = x
    for _ in range(3):
        # As a rounding to eight bits of mantissa that the compiler may not widen away.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.concatenate(parts)


def to_columns(words: Int32[Array, "rows out"], columns: Any) -> None:
    """Writes words to a scratch `[out / 128, rows, 128]`, the one form whose rows the hardware reads with a stride."""
    for column in range(columns.shape[0]):
        columns[column] = words[:, column * LANES : (column + 1) * LANES]


def strided(columns: Any, start: Any, count: int, stride: int) -> jax.Array:
    """Rows `start, start + stride, ...` of what `to_columns` wrote: `[count, out]`."""
    rows = pl.ds(start, count, stride=stride)
    return jnp.concatenate([columns[column, rows, :] for column in range(columns.shape[0])], axis=1)


def spread(rows: Sequence[Float[Array, "1 out"]], count: int) -> jax.Array:
    """Each row over its share of `count` rows: `[count, out]`, or the row itself where there is one.

    Example:
        >>> spread([jnp.array([[1.0]]), jnp.array([[2.0]])], 4).ravel().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    if len(rows) == 1:
        return rows[0]
    share, out = count // len(rows), rows[0].shape[1]
    if share % SUBLANES == 0:
        return jnp.concatenate([jnp.broadcast_to(row, (share, out)) for row in rows])
    place = lax.broadcasted_iota(jnp.int32, (count, out), 0)
    result = jnp.broadcast_to(rows[0], (count, out))
    for g in range(1, len(rows)):
        result = jnp.where(place >= g * share, rows[g], result)
    return result
