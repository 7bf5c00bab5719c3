"""Hash functions of integer keys, pure and the same in every process: a seed and a key in, uint32 out."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped, UInt32


def mix(x: jax.Array) -> jax.Array:
    """Murmur3's 32-bit finaliser: a bijection on uint32 whose every output bit depends on every input bit."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def multiply_high(x: UInt32[Array, "..."], y: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The upper 32 bits of the 64-bit product, from products of halves: jax has no uint64 unless it is asked for."""
    x0, x1, y0, y1 = x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16
    upper = x1 * y0 + ((x0 * y0) >> 16)
    lower = x0 * y1 + (upper & 0xFFFF)
    return x1 * y1 + (upper >> 16) + (lower >> 16)


def to_range(hashed: UInt32[Array, "..."], buckets: int) -> Int32[Array, "..."]:
    """`floor(hashed * buckets / 2**32)`: cells of `[0, buckets)` whose shares of the hashes differ by at most `2**-32`.

    No remainder is taken (Lemire, "Fast random integer generation in an interval", 2019): the upper bits decide, which
    are the good ones of multiplicative hashes.

    Raises:
        ValueError: `buckets` is not in `[1, 2**31]`.

    Example:
        >>> to_range(jnp.array([0, 2**31, 2**32 - 1], jnp.uint32), 10).tolist()
        [0, 5, 9]
    """
    if not 1 <= buckets <= 2**31:
        raise ValueError(f"buckets={buckets}: between 1 and 2**31, so that a cell is an int32")
    return multiply_high(hashed, jnp.uint32(buckets)).astype(jnp.int32)


def murmur3(words: UInt32[Array, "*batch words"], seed: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3_x86_32 (Appleby 2011) of the little-endian bytes of `words`.

    Example:
        >>> hex(int(murmur3(jnp.array([0x87654321], jnp.uint32), jnp.uint32(0x5082EDEE))))
        '0x2362f9de'
    """

    def rotated(x: jax.Array, by: int) -> jax.Array:
        return (x << by) | (x >> (32 - by))

    state = jnp.asarray(seed, jnp.uint32)
    for i in range(words.shape[-1]):
        word = rotated(words[..., i] * jnp.uint32(0xCC9E2D51), 15) * jnp.uint32(0x1B873593)
        state = rotated(state ^ word, 13) * jnp.uint32(5) + jnp.uint32(0xE6546B64)
    return mix(state ^ jnp.uint32(4 * words.shape[-1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MultiplyShift:
    """`((sum_i a_i x_i + b) mod 2**64) >> 32` of keys of `words` words: strongly universal.

    Over the draw of `a` and `b`, the hashes of two different keys are independent and uniform: every bound that asks
    for pairwise independence holds, whatever the keys (Dietzfelbinger 1996; Thorup 2015, section 3.3).

    Attributes:
        multiplier: `uint32[*functions, words, 2]`, the lower and the upper half of each `a_i`.
        addend: `uint32[*functions, 2]`, of `b`.

    Example:
        >>> family = MultiplyShift.make(jax.random.key(0), functions=(3,))
        >>> to_range(family(jnp.arange(5, dtype=jnp.uint32)), 100).shape
        (5, 3)
    """

    multiplier: Shaped[Array, "*functions words 2"]
    addend: Shaped[Array, "*functions 2"]

    @classmethod
    def make(cls, key: jax.Array, *, functions: tuple[int, ...] = (), words: int = 1) -> "MultiplyShift":
        """Draws `functions` independent functions of keys of `words` words.

        Raises:
            ValueError: `words` is below 1.
        """
        if words < 1:
            raise ValueError(f"words={words}: a key has at least 1 word")
        bits = jax.random.bits(key, (*functions, words + 1, 2), jnp.uint32)
        return cls(multiplier=bits[..., :words, :], addend=bits[..., words, :])

    def __call__(self, keys: UInt32[Array, "*batch"]) -> UInt32[Array, "..."]:
        """The hashes `uint32[*batch, *functions]` of keys of one word."""
        keys = keys.reshape(*keys.shape, *(1,) * (self.addend.ndim - 1), 1)
        return self.of_words(keys)

    def of_words(self, keys: UInt32[Array, "... words"]) -> UInt32[Array, "..."]:
        """The hashes of keys whose axes but the last broadcast against `functions`."""
        low, high = self.addend[..., 0], self.addend[..., 1]
        for i in range(self.multiplier.shape[-2]):
            a, x = self.multiplier[..., i, :], keys[..., i]
            added = low + a[..., 0] * x
            carry = (added < low).astype(jnp.uint32)
            high = high + a[..., 1] * x + multiply_high(a[..., 0], x) + carry
            low = added
        return high


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tabulation:
    """The exclusive or of a table entry for each byte of the key: 3-independent, and for chains and probing as good as
    random (Zobrist 1970; Patrascu and Thorup 2012). A function takes 4 KiB.

    Attributes:
        tables: `uint32[*functions, 4, 256]`.

    Example:
        >>> Tabulation.make(jax.random.key(0), functions=(3,))(jnp.arange(5, dtype=jnp.uint32)).shape
        (5, 3)
    """

    tables: Shaped[Array, "*functions 4 256"]

    @classmethod
    def make(cls, key: jax.Array, *, functions: tuple[int, ...] = ()) -> "Tabulation":
        """Draws `functions` independent functions."""
        return cls(tables=jax.random.bits(key, (*functions, 4, 256), jnp.uint32))

    def __call__(self, keys: UInt32[Array, "*batch"]) -> UInt32[Array, "..."]:
        """The hashes `uint32[*batch, *functions]` of keys."""
        out = jnp.uint32(0)
        for i in range(4):
            entries = jnp.take(self.tables[..., i, :], (keys >> (8 * i)) & 0xFF, axis=-1)
            out = out ^ jnp.moveaxis(entries, range(self.tables.ndim - 2), range(-(self.tables.ndim - 2), 0))
        return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Murmur:
    """MurmurHash3 with drawn seeds: four bytes a function, no guarantee, and no weakness on keys that occur by chance.

    Attributes:
        seed: `uint32[*functions]`.

    Example:
        >>> Murmur.make(jax.random.key(0), functions=(3,))(jnp.arange(5, dtype=jnp.uint32)).shape
        (5, 3)
    """

    seed: Shaped[Array, "*functions"]

    @classmethod
    def make(cls, key: jax.Array, *, functions: tuple[int, ...] = ()) -> "Murmur":
        """Draws `functions` seeds."""
        return cls(seed=jax.random.bits(key, functions, jnp.uint32))

    def __call__(self, keys: UInt32[Array, "*batch"]) -> UInt32[Array, "..."]:
        """The hashes `uint32[*batch, *functions]` of keys."""
        return murmur3(keys.reshape(*keys.shape, *(1,) * self.seed.ndim, 1), self.seed)
