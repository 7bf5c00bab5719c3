"""NoMAD on whole texts: codebooks of every layer from a calibration text, and what its logits cost a decoder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from effjax.errors import ConfigError
from effjax.kv.capture import CapturedKV
from effjax.kv.nomad import BLOCK, ENTRIES, Codebooks, NoMAD, nearest, query_table
from effjax.kv.nomad_slots import NomadLayers
from effjax.models.config import DecoderConfig
from effjax.models.decoder import DecoderApply, unstack_layers
from effjax.models.rope import rotary_angles, rotate

PyTree = Any


def rotated(
    config: DecoderConfig, x: Float[Array, "kv_heads tokens head_dim"], length: int
) -> Float[Array, "kv_heads tokens head_dim"]:
    """Keys of successive windows of `length` tokens, or gradients with respect to them, after the rotation.

    Raises:
        ConfigError: there are no whole windows.
    """
    heads, tokens, head_dim = x.shape
    if tokens % length:
        raise ConfigError(f"NoMAD: {tokens} tokens are no whole windows of {length}; capture them with skip=0")
    windows = x.reshape(heads, -1, length, head_dim).transpose(1, 2, 0, 3)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    turned = rotate(windows, *rotary_angles(config, positions, jnp.full((1,), length, jnp.int32)))
    return turned.transpose(2, 0, 1, 3).reshape(x.shape)


def learn_layers(
    method: NoMAD, config: DecoderConfig, captured: CapturedKV, length: int, *, key: Key[Array, ""]
) -> NomadLayers:
    """Codebooks of every layer and key head.

    Args:
        method: the quantizer.
        config: of the decoder.
        captured: of a calibration text, with all tokens of its windows (`effjax.kv.capture.capture_kv`).
        length: tokens of a window; positions beyond it are not learned from.
        key: of the draws of k-means; each layer gets its own.

    Raises:
        ConfigError: see `NoMAD.learn` and `rotated`.

    Example:
        >>> from effjax.kv.capture import capture_kv
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> tokens = jnp.arange(24).reshape(3, 8)
        >>> params = Decoder(config).init(jax.random.key(0), tokens)["params"]
        >>> layers = learn_layers(
        ...     NoMAD(d_sub=2), config, capture_kv(config, params, tokens), 8, key=jax.random.key(1)
        ... )
        >>> layers.books[0].shape, apply_nomad(config, params, layers, tokens).shape
        ((4, 4, 16, 2), (3, 8, 256))
    """
    keys = jax.random.split(key, captured.keys.shape[0])
    books = tuple(
        method.learn(rotated(config, k, length), rotated(config, grads, length) if method.fisher else None, key=keys[i])
        for i, (k, grads) in enumerate(zip(captured.keys, captured.key_grads, strict=True))
    )
    return NomadLayers(books=books)


def apply_nomad(
    config: DecoderConfig, params: PyTree, layers: NomadLayers, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """Logits of whole texts in which every attention logit is a sum of table entries, the same numbers as in decoding.

    The model is not touched: projections are intercepted, and what goes into the last one of an attention is replaced.

    Raises:
        ConfigError: there are not codebooks for each layer.
    """
    if len(layers.books) != config.num_hidden_layers:
        raise ConfigError(
            f"NoMAD: there are codebooks for {len(layers.books)} layers, the model has {config.num_hidden_layers}; "
            "learn them with learn_layers on this model"
        )
    batch, length = tokens.shape
    positions = jax.lax.broadcasted_iota(jnp.int32, (batch, length), 1)
    angles = rotary_angles(config, positions, jnp.full((batch,), length, jnp.int32))
    seen: dict[str, Array] = {}
    ends = ("q_norm", "k_norm") if config.qk_norm else ("q_proj", "k_proj")
    places = {**dict(zip(ends, ("q", "k"), strict=True)), "v_proj": "v"}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        if context.method_name != "__call__" or path[1:2] != ("attention",) or len(path) != 3:
            return call(*args, **kwargs)
        if path[2] == "o_proj":
            books = layers.books[int(path[0].removeprefix("layers_"))]
            y = _attend(config, seen["q"], seen["k"], seen["v"], books, layers).astype(args[0].dtype)
            return call(y.reshape(args[0].shape), *args[1:], **kwargs)
        y = call(*args, **kwargs)
        if part := places.get(path[2]):
            heads = y.reshape(batch, length, -1, config.head_dim)
            seen[part] = heads if part == "v" else rotate(heads, *angles)
        return y

    unrolled = dataclasses.replace(config, scan_layers=False, remat=False)
    flat = unstack_layers(params) if "layers" in params else params
    with nn.intercept_methods(intercept):
        return DecoderApply(unrolled)({"params": flat}, tokens)


def _attend(
    config: DecoderConfig,
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    books: Codebooks,
    layers: NomadLayers,
) -> Float[Array, "batch length kv_heads group head_dim"]:
    batch, length, kv_heads, head_dim = k.shape
    q = q.astype(jnp.float32).reshape(batch, length, kv_heads, -1, head_dim) * head_dim**-0.5
    k, v = (x.astype(jnp.float32).swapaxes(1, 2) for x in (k, v))
    codes = nearest(k, books)  # [batch, kv_heads, length, subs]
    if layers.eight_bits:
        tables = query_table(q, books)
        # Products of whole numbers below 2**16 with ones and zeros: float32 sums are exact in any order.
        table = tables.table.astype(jnp.float32).reshape(*q.shape[:-1], -1)
        picks = jax.nn.one_hot(codes, ENTRIES, dtype=jnp.float32).reshape(batch, kv_heads, length, -1)
        sums = jnp.einsum("bthgc,bhsc->bhgts", table, picks, precision="highest")
        scale, bias = (x.transpose(0, 2, 3, 1)[..., None] for x in (tables.scale, tables.bias))
        logits = sums / scale + bias
    else:
        index = codes[..., None, None].astype(jnp.int32)
        centres = jnp.take_along_axis(books[None, :, None], index, axis=-2).reshape(k.shape)
        logits = jnp.einsum("bthgd,bhsd->bhgts", q, centres, precision="highest")
    at, slot = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    if layers.recent:
        exact = jnp.einsum("bthgd,bhsd->bhgts", q, k, precision="highest")
        logits = jnp.where((slot >= (at + 1) // BLOCK * BLOCK)[None, None, None], exact, logits)
    shown = slot <= at
    if config.sliding_window is not None:
        shown &= at - slot < config.sliding_window
    weights = jax.nn.softmax(jnp.where(shown[None, None, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhgts,bhsd->bthgd", weights, v, precision="highest")
