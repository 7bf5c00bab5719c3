"""Blocks of a transformer in plain JAX, for encoders of images and short texts: every token sees every other."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.models.attention import attend

Layer = dict[str, Any]


def init_dense(key: jax.Array, n: int, m: int, scale: float = 1.0) -> Layer:
    """A kernel `[n, m]` whose outputs have `scale` times the deviation of its inputs, and a bias of zeros."""
    return {"kernel": jax.random.normal(key, (n, m)) * scale * n**-0.5, "bias": jnp.zeros(m)}


def dense(params: Layer, x: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
    """`x @ kernel + bias`."""
    return x @ params["kernel"] + params["bias"]


def init_norm(width: int) -> Layer:
    """Scale and shift of a layer norm."""
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def layer_norm(params: Layer, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Layer norm, in float32 inside.

    Example:
        >>> layer_norm(init_norm(4), jnp.array([1.0, 1.0, 3.0, 3.0])).round(3).tolist()
        [-1.0, -1.0, 1.0, 1.0]
    """
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * params["scale"] + params["bias"]


def unit(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """float32 of length 1; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def init_block(key: jax.Array, width: int, layers: int = 1) -> Layer:
    """Attention and a perceptron of four times the width, each behind a norm.

    Args:
        key: of the kernels.
        width: of a token.
        layers: of the whole network: what a block adds is smaller in a deeper one.
    """
    keys, small = jax.random.split(key, 6), (2 * layers) ** -0.5
    attention = {f"{name}_proj": init_dense(k, width, width) for name, k in zip("qkv", keys, strict=False)}
    return {
        "norm_1": init_norm(width),
        "attention": attention | {"o_proj": init_dense(keys[3], width, width, small)},
        "norm_2": init_norm(width),
        "mlp": {
            "up_proj": init_dense(keys[4], width, 4 * width),
            "down_proj": init_dense(keys[5], 4 * width, width, small),
        },
    }


def apply_block(
    params: Layer, x: Float[Array, "batch tokens width"], heads: int, seen: Bool[Array, "batch tokens"] | None = None
) -> Float[Array, "batch tokens width"]:
    """One block.

    Args:
        params: from `init_block`.
        x: tokens.
        heads: of attention; divides the width.
        seen: tokens that others may look at; None for all.

    Example:
        >>> params = init_block(jax.random.key(0), 8)
        >>> x = jax.random.normal(jax.random.key(1), (2, 5, 8))
        >>> seen = jnp.arange(5) < 3
        >>> y, z = (apply_block(params, x.at[:, 4].set(v), 2, jnp.tile(seen, (2, 1))) for v in (0.0, 1.0))
        >>> y.shape, bool((y[:, :4] == z[:, :4]).all())
        ((2, 5, 8), True)
    """
    batch, tokens, width = x.shape
    y, attention = layer_norm(params["norm_1"], x), params["attention"]

    def split(name: str) -> jax.Array:
        return dense(attention[name], y).reshape(batch, tokens, heads, width // heads)

    mask = jnp.ones((1, 1, 1, tokens), bool) if seen is None else seen[:, None, None]
    q, k, v = split("q_proj")[:, :, :, None], split("k_proj").swapaxes(1, 2), split("v_proj").swapaxes(1, 2)
    x = x + dense(attention["o_proj"], attend(q, k, v, mask).reshape(x.shape))
    hidden = jax.nn.gelu(dense(params["mlp"]["up_proj"], layer_norm(params["norm_2"], x)))
    return x + dense(params["mlp"]["down_proj"], hidden)


def init_blocks(key: jax.Array, width: int, layers: int) -> Layer:
    """`"block_0"` and so on."""
    return {f"block_{i}": init_block(k, width, layers) for i, k in enumerate(jax.random.split(key, layers))}


def apply_blocks(
    params: Layer, x: Float[Array, "batch tokens width"], heads: int, seen: Bool[Array, "batch tokens"] | None = None
) -> Float[Array, "batch tokens width"]:
    """All blocks, one after the other."""
    for i in range(sum(name.startswith("block_") for name in params)):
        x = apply_block(params[f"block_{i}"], x, heads, seen)
    return x
