"""Attention of a decode step in which each row asks some of its heads alone; the cache of the others is not read.

Source: Liu et al., Deja Vu (ICML 2023), section 4.2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.ops.attention import Implementation, decode_attention
from effjax.ops.attention_blocks import Slots
from effjax.ops.sparse_mlp import top_mask


def head_sparse_attention(
    q: Float[Array, "batch kv_heads group head_dim"],
    k: Slots,
    v: Slots,
    length: Int[Array, "batch kv_heads"],
    heads: Bool[Array, "batch kv_heads group"],
    *,
    start: Int[Array, "batch kv_heads"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch kv_heads group head_dim"]:
    """`effjax.ops.decode_attention` for chosen query heads; the others give zeros.

    A key head none of whose query heads is chosen counts as empty, and the kernels of every platform read filled slots
    alone: what is saved is its share of the cache. Keys and values of all heads must be written nevertheless, since a
    later token may ask for them.

    Args:
        q, k, v, length, start, scale, implementation: see `decode_attention`.
        heads: whether a row asks a query head, as from `chosen_heads`.

    Raises:
        ConfigError: `heads` of another shape than `q` without its last axis, or what `decode_attention` refuses.

    Example:
        >>> q, k = jnp.ones((1, 2, 2, 16)), jnp.ones((1, 2, 8, 16))
        >>> heads = jnp.array([[[True, False], [False, False]]])
        >>> head_sparse_attention(q, k, 3 * k, jnp.array([[8, 8]]), heads)[..., 0].tolist()
        [[[3.0, 0.0], [0.0, 0.0]]]
    """
    if heads.shape != q.shape[:-1]:
        raise ConfigError(f"head_sparse_attention: heads must be {list(q.shape[:-1])}, found {list(heads.shape)}")
    asked = jnp.where(heads.any(-1), length, 0)
    y, _ = decode_attention(q, k, v, asked, start=start, scale=scale, implementation=implementation)
    return jnp.where(heads[..., None], y, 0)


def chosen_heads(scores: Float[Array, "batch heads"], k: int, *, kv_heads: int) -> Bool[Array, "batch kv_heads group"]:
    """The `k` query heads of best score in every row, by the key head that they share.

    Args:
        scores: of a predictor of heads (`needed_heads` are its labels).
        k: query heads a row.
        kv_heads: they share keys in runs, as in grouped-query attention.

    Raises:
        ConfigError: `kv_heads` does not divide the heads.

    Example:
        >>> chosen_heads(jnp.array([[0.0, 3.0, 1.0, 2.0]]), 2, kv_heads=2).tolist()
        [[[False, True], [False, True]]]
    """
    rows, count = scores.shape
    if count % kv_heads:
        raise ConfigError(f"chosen_heads: {count} heads do not share {kv_heads} key heads evenly")
    return top_mask(scores, k).reshape(rows, kv_heads, count // kv_heads)
