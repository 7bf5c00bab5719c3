"""A shuffle that is computed and not stored: where any position of any epoch goes, for any number of examples."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from effjax.errors import ConfigError
from effjax.hashing.integers import mix, to_range

ROUNDS = 6
LARGEST = 2**30  # positions of two epochs then add up to an int32


def shuffled(positions: Int32[Array, "*batch"], n: int, seed: UInt32[Array, "..."]) -> Int32[Array, "*batch"]:
    """The examples at these positions of a permutation of `range(n)` that `seed` chooses.

    A position is a pair of digits, to which rounds of a hash of the other digit are added in turn (a Feistel network on
    `a * b >= n`, Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). What falls behind `n`, at most one
    in `sqrt(n)`, goes through it again. Nothing of size `n` is made.

    Args:
        positions: in `[0, n)`.
        n: number of examples.
        seed: of the permutation, broadcasts against `positions`.

    Raises:
        ConfigError: `n` is below 1 or above 2**30.

    Example:
        >>> sorted(shuffled(jnp.arange(10), 10, jnp.uint32(3)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    check_count(n)
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    seed = mix(seed + jnp.uint32(0x9E3779B9))

    def once(x: jax.Array) -> jax.Array:
        left, right = x // columns, x % columns
        for i in range(0, ROUNDS, 2):
            left = (left + to_range(mix(mix(right.astype(jnp.uint32) + jnp.uint32(i)) ^ seed), rows)) % rows
            salt = jnp.uint32(i + 1)
            right = (right + to_range(mix(mix(left.astype(jnp.uint32) + salt) + seed), columns)) % columns
        return left * columns + right

    def again(x: jax.Array) -> jax.Array:
        return jnp.where(x >= n, once(x), x)

    return jax.lax.while_loop(lambda x: jnp.any(x >= n), again, once(positions))


def check_count(n: int) -> None:
    """Raises a ConfigError where positions in `n` examples would not be int32."""
    if not 1 <= n <= LARGEST:
        raise ConfigError(f"n={n}: between 1 and 2**30 examples; beyond, draw from shards one after another")
