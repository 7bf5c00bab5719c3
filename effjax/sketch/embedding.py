"""Embeddings read from one hashed table: ROBE's blocks of values, and Unified Embedding's rows for many features.

Both are pure functions of a table that the caller trains; only what a batch needs is read, and the gradient is a
scatter into the same slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from effjax.arrays.hashed import slots_and_signs
from effjax.hashing.integers import mix


def feature_seeds(seed: int | UInt32[Array, ""], features: int) -> UInt32[Array, " features"]:
    """A hash function for each of so many categorical features that share a table (feature multiplexing).

    Example:
        >>> feature_seeds(0, 3).shape
        (3,)
    """
    return mix(mix(jnp.asarray(seed, jnp.uint32)) + jnp.arange(1, features + 1, dtype=jnp.uint32))


def robe_lookup(
    table: Float[Array, " slots"],
    seed: UInt32[Array, ""],
    ids: Int[Array, "*batch"],
    *,
    features: int,
    block: int = 1,
) -> Float[Array, "*batch features"]:
    """Rows `ids` of an embedding whose values are hashed in blocks (ROBE, Desai, Chou and Shrivastava 2022).

    The same rows as those of `effjax.arrays.Hashed(table=table, seed=seed, in_features=..., out_features=features,
    block=block)`, which has a fixed number of rows; here an id may be any 32-bit integer.

    Args:
        table: the shared values.
        seed: the hash function; give every feature its own, see `feature_seeds`.
        ids: which rows.
        features: length of a row.
        block: consecutive values of a row that lie side by side in the table, so that they are one memory access.

    Raises:
        ValueError: a block that is not from 1 to the number of slots.

    Example:
        >>> import jax
        >>> table = jax.random.normal(jax.random.key(0), (1000,))
        >>> robe_lookup(table, jnp.uint32(7), jnp.array([[3, 900_000]]), features=16, block=8).shape
        (1, 2, 16)
    """
    if not 1 <= block <= table.shape[0]:
        raise ValueError(f"block={block}: from 1 to the {table.shape[0]} slots of the table")
    slot, sign = slots_and_signs(seed, ids.reshape(-1), features, table.shape[0], block)
    rows = sign.astype(table.dtype) * table[slot]
    return rows.reshape(*ids.shape, features)


def unified_lookup(
    table: Float[Array, "rows width"],
    seeds: UInt32[Array, " features"],
    ids: Int[Array, "*batch features"],
    *,
    lookups: int = 1,
) -> Float[Array, "*batch features lookups*width"]:
    """One embedding a categorical feature, all from one table (Unified Embedding, Coleman et al. 2023, section 4).

    Feature `f` reads `lookups` rows of the table, each at a hash of its id under its own seed, and joins them: features
    that deserve more values look up more rows. Collisions between features cost little, since the layers behind can
    learn to read each feature along its own directions; collisions within one feature cannot be undone.

    Args:
        table: the shared rows.
        seeds: a hash function a feature, see `feature_seeds`.
        ids: the value of every feature, any 32-bit integers.
        lookups: rows that make an embedding.

    Raises:
        ValueError: another number of features than of seeds, or no look-ups.

    Example:
        >>> import jax
        >>> table = jax.random.normal(jax.random.key(0), (100, 8))
        >>> ids = jnp.array([[3, 5, 3], [4, 5, 1]])
        >>> unified_lookup(table, feature_seeds(0, 3), ids, lookups=2).shape
        (2, 3, 16)
    """
    if lookups < 1:
        raise ValueError(f"lookups={lookups}: at least 1")
    if seeds.ndim != 1 or ids.ndim < 1 or ids.shape[-1] != seeds.shape[0]:
        raise ValueError(f"ids {list(ids.shape)}: the last axis holds one id for each of {list(seeds.shape)} seeds")
    key = mix(seeds ^ mix(ids.astype(jnp.uint32)))[..., None] + jnp.arange(lookups, dtype=jnp.uint32)
    row = mix(key) % jnp.uint32(table.shape[0])
    return table[row.astype(jnp.int32)].reshape(*ids.shape, lookups * table.shape[1])
