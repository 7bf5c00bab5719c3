"""Caches with recognisable contents for the tests of this folder."""

import jax.numpy as jnp
import numpy as np

from effjax.kv.cache import KVCache
from effjax.kv.importance import ATTENTION_RECEIVED


def filled(
    lengths, *, slots: int, layers: int = 2, head_dim: int = 3, offsets=None, seed: int = 0, importance=None
) -> KVCache:
    """A cache whose row `b`, head `h` holds `lengths[b][h]` tokens at increasing positions below the row's offset."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    batch, heads = lengths.shape
    offsets = lengths.max(axis=1) + 4 if offsets is None else np.asarray(offsets)
    shape = (layers, batch, heads, slots)
    live = np.broadcast_to(np.arange(slots) < lengths[:, :, None], shape)
    positions = np.full(shape, -1, np.int32)
    for at in np.ndindex(layers, batch, heads):
        count = lengths[at[1:]]
        positions[at][:count] = np.sort(rng.choice(offsets[at[1]], count, replace=False))
    return KVCache(
        k=jnp.asarray(np.where(live[..., None], rng.standard_normal((*shape, head_dim)), 0), jnp.float32),
        v=jnp.asarray(np.where(live[..., None], rng.standard_normal((*shape, head_dim)), 0), jnp.float32),
        positions=jnp.asarray(positions),
        scores=jnp.asarray(np.where(live, rng.random(shape), 0), jnp.float32),
        length=jnp.broadcast_to(jnp.asarray(lengths), shape[:3]),
        offset=jnp.asarray(offsets, jnp.int32),
        importance=importance or ATTENTION_RECEIVED,
    )
