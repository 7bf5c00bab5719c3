"""A Llama-family decoder in Flax Linen: one attention for training, prefill and cached decoding.

Llama 2 and 3, Mistral, Qwen2, Qwen3 and OPT differ only in what `DecoderConfig` says. Sources: Touvron et al., Llama 2
(2023); Zhang et al., OPT (2022); Zhang and Sennrich, RMSNorm (2019); Shazeer, SwiGLU (2020); Ainslie et al.,
grouped-query attention (2023).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache, add_scores, init_cache, write_layer
from effjax.kv.coders import KVCoders
from effjax.kv.importance import ATTENTION_RECEIVED, Importance
from effjax.kv.layer_cache import LayerCache, close_layers, open_layers
from effjax.kv.nomad_slots import NomadLayers
from effjax.models.attention import attend, attend_to_filled, attend_to_slots
from effjax.models.config import DecoderConfig
from effjax.models.rope import frequencies, rotary_angles, rotate
from effjax.sequential import Stage

PyTree = Any
OPT_OFFSET = 2  # rows of OPT's table of positions before that of position 0
Hidden = Float[Array, "batch length hidden"]


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis and scales, in float32; the input's dtype is kept."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*any width"]) -> Float[Array, "*any width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))).astype(x.dtype)


class LayerNorm(nn.Module):
    """Takes the mean from the last axis, divides by the standard deviation, scales and shifts, in float32."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*any width"]) -> Float[Array, "*any width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.expand_dims(p.astype(jnp.float32), tuple(range(x.ndim - 1))) for p in (scale, bias))
        return (wide * scale + bias).astype(x.dtype)


def norm(config: DecoderConfig, name: str) -> RMSNorm | LayerNorm:
    """The norm that the model has before attention, before the feed-forward layer and at its end."""
    kind = LayerNorm if config.is_opt else RMSNorm
    return kind(config.rms_norm_eps, config.param_dtype, name=name)


class Linear(nn.Module):
    """`x @ kernel (+ bias)` with a kernel `[in, out]`, computed in the dtype of `x`."""

    features: int
    use_bias: bool
    param_dtype: str

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        y = jnp.dot(x, kernel.astype(x.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(x.dtype)[None, None, :]
        return y


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; softmax in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        cache: KVCache | LayerCache | None,
        layer: Int[Array, ""],
        positions: Int[Array, "batch length"],
        lengths: Int[Array, " batch"],
        angles: tuple[Array, Array],
    ) -> tuple[Hidden, KVCache | LayerCache | None]:
        c, (batch, length, _) = self.config, x.shape
        kv_heads, group = (
            c.num_key_value_heads,
            c.num_attention_heads // c.num_key_value_heads,
        )

        def heads(name: str, count: int, norm: str | None) -> Array:
            y = Linear(count * c.head_dim, c.qkv_bias, c.param_dtype, name=name)(x)
            y = y.reshape(batch, length, count, c.head_dim)
            return y if norm is None or not c.qk_norm else RMSNorm(c.rms_norm_eps, c.param_dtype, name=norm)(y)

        q = rotate(heads("q_proj", c.num_attention_heads, "q_norm"), *angles)
        q = q.reshape(batch, length, kv_heads, group, c.head_dim)
        unrotated = heads("k_proj", kv_heads, "k_norm")
        k = rotate(unrotated, *angles).swapaxes(1, 2)
        v = heads("v_proj", kv_heads, None).swapaxes(1, 2)
        if cache is None:
            slot_positions = jnp.broadcast_to(positions[:, None, :], (batch, kv_heads, length))
        elif isinstance(cache, LayerCache):
            cache = cache.write(k, v, unrotated.swapaxes(1, 2))
            slot_positions = cache.positions
        else:
            cache = write_layer(cache, layer, k, v, positions, lengths)
            k, v, slot_positions = (
                cache.k[layer].astype(x.dtype),
                cache.v[layer].astype(x.dtype),
                cache.positions[layer],
            )

        def seen(positions: Int[Array, "batch queries"]) -> Bool[Array, "batch kv_heads queries slots"]:
            query_at, slot_at = positions[:, None, :, None], slot_positions[:, :, None, :]
            found = (slot_at >= 0) & (slot_at <= query_at)
            return found if c.sliding_window is None else found & (query_at - slot_at < c.sliding_window)

        if cache is None:
            y, received = attend(q, k, v, seen(positions)), None
        else:  # what padding attends to does not count
            asked = cache.importance.query_weights(lengths, length)
            if isinstance(cache, LayerCache) and length == 1 and c.sliding_window is None and cache.sums_inside:
                y, received = attend_to_filled(q, *cache.operands(), cache.length, asked, cache.importance)
            else:
                if isinstance(cache, LayerCache):
                    k, v = (vectors.astype(x.dtype) for vectors in cache.read())
                y, received = attend_to_slots(q, k, v, seen, positions, asked, cache.importance)
        if isinstance(cache, LayerCache):
            cache = dataclasses.replace(cache, received=received)
        elif cache is not None and received is not None:
            cache = add_scores(cache, layer, received, lengths)
        y = y.reshape(batch, length, c.num_attention_heads * c.head_dim)
        return Linear(c.hidden_size, c.o_bias, c.param_dtype, name="o_proj")(y), cache


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))`: SwiGLU, or ReGLU with a shift (Mirzadeh et al., 2024); OPT: `down(act(up(x)))`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        c = self.config
        width = c.one_width("MLP")
        gate = None if c.is_opt else Linear(width, c.mlp_bias, c.param_dtype, name="gate_proj")(x)
        up = Linear(width, c.mlp_bias, c.param_dtype, name="up_proj")(x)
        z = up if gate is None else gate
        act = jax.nn.silu(z) if c.hidden_act == "silu" else jax.nn.relu(z - jnp.asarray(c.relu_shift, z.dtype))
        h = act if gate is None else act * up
        return Linear(c.hidden_size, c.mlp_bias, c.param_dtype, name="down_proj")(h)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalised before and added to the residual stream.

    It is made from the configuration `of_layer`, where layers have widths of their own.

    The carry `(x, cache)` holds the cache of all layers, so that a scan updates it in place at its layer; or that of
    this layer alone where layers are written out and the cache is split.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Hidden, KVCache | LayerCache | None],
        layer: Int[Array, ""],
        positions: Int[Array, "batch length"],
        lengths: Int[Array, " batch"],
        angles: tuple[Array, Array],
    ) -> tuple[tuple[Hidden, KVCache | LayerCache | None], None]:
        c, (x, cache) = self.config, carry
        after_norm = jax.nn.relu if c.norm_relu else lambda y: y
        y = after_norm(norm(c, "attention_norm")(x))
        y, cache = Attention(c, name="attention")(y, cache, layer, positions, lengths, angles)
        x = x + y
        y = after_norm(norm(c, "mlp_norm")(x))
        return (x + MLP(c, name="mlp")(y), cache), None


class Embed(nn.Module):
    """The token table, looked up on the way in and, when tied, multiplied on the way out; OPT adds one of positions."""

    config: DecoderConfig

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, self.config.param_dtype)
        if self.config.is_opt:
            shape = (self.config.max_position_embeddings + OPT_OFFSET, self.config.hidden_size)
            self.positions = self.param("positions", nn.initializers.normal(0.02), shape, self.config.param_dtype)

    def __call__(self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"]) -> Hidden:
        x = jnp.take(self.embedding, tokens, axis=0)
        if self.config.is_opt:  # NaN beyond the last position that the model has
            x = x + jnp.take(self.positions, positions + OPT_OFFSET, axis=0, mode="fill", fill_value=jnp.nan)
        return x.astype(self.config.dtype or self.embedding.dtype)

    def attend(self, x: Hidden) -> Float[Array, "batch length vocab"]:
        contract_hidden = (((2,), (1,)), ((), ()))
        return jax.lax.dot_general(
            x,
            self.embedding.astype(x.dtype),
            contract_hidden,
            preferred_element_type=jnp.float32,
        )


class Head(nn.Module):
    """The untied output projection, to float32 logits."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Hidden) -> Float[Array, "batch length vocab"]:
        c = self.config
        kernel = self.param(
            "kernel",
            nn.initializers.normal(0.02),
            (c.hidden_size, c.vocab_size),
            c.param_dtype,
        )
        return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


class Decoder(nn.Module):
    """The language model: tokens to logits, with or without a cache.

    Parameters (`layers_{i}/...`, or `layers/...` with a leading layer axis when `config.scan_layers`):
    `embed/embedding`, `layers_{i}/attention_norm/scale`, `layers_{i}/attention/{q,k,v,o}_proj/{kernel,bias}`,
    `layers_{i}/attention/{q,k}_norm/scale`, `layers_{i}/mlp_norm/scale`, `layers_{i}/mlp/{gate,up,down}_proj/kernel`,
    `final_norm/scale`, and `lm_head/kernel` unless tied. Kernels are `[in, out]`. OPT has no `gate_proj`, norms have a
    `bias` too, and `embed/positions`.

    Example:
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model, tokens = Decoder(config), jnp.zeros((1, 5), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 5, 256)
        >>> cache = new_cache(config, batch=1, slots=8)
        >>> logits, cache = model.apply(variables, tokens, cache=cache)
        >>> cache.length[0, 0].tolist()
        [5, 5, 5, 5]
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
    ) -> Float[Array, "batch length vocab"] | tuple[Float[Array, "batch length vocab"], KVCache]:
        """Logits of every token's successor.

        Args:
            tokens: int32, right padded.
            cache: keys and values of the tokens before these; needs room for `lengths` more in every slot row, which
                cannot be checked under `jit` (see `KVCache`).
            lengths: int32, valid tokens of each row; None means all. A row of 0 leaves its cache as it is.
            last_only: gives logits of each row's last valid token alone, `[batch, 1, vocab]`; a prompt then does not
                pay for the head at every token.

        Returns:
            Logits, float32; with a cache also the cache after these tokens. Logits of padding mean nothing.

        Raises:
            ConfigError: the shapes of tokens, lengths, cache and configuration do not fit.
        """
        c = self.config
        batch, length = _check_shapes(c, tokens, cache, lengths)
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.offset
        counts = jnp.full((batch,), length, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        positions = start[:, None] + jax.lax.broadcasted_iota(jnp.int32, (batch, length), 1)
        angles = rotary_angles(c, positions, start + counts)
        if cache is not None:  # else fused into every layer, which takes sines and cosines again for each of its heads
            angles = jax.lax.optimization_barrier(angles)

        embed = Embed(c, name="embed")
        carry: Any = (embed(tokens, positions), cache)
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # type: ignore[arg-type]  # annotated too narrowly
                length=c.num_hidden_layers,
            )
            indices = jnp.arange(c.num_hidden_layers, dtype=jnp.int32)
            carry, _ = scanned(c, name="layers")(carry, indices, positions, counts, angles)
        elif cache is not None and cache.is_split:
            x, (cache, layers) = carry[0], open_layers(cache, positions, counts)
            for i in range(c.num_hidden_layers):
                layer = block(c.of_layer(i), name=f"layers_{i}")
                carry, _ = layer((x, layers[i]), jnp.int32(i), positions, counts, angles)
                x, layers[i] = carry
            carry = x, close_layers(cache, layers, counts)
        else:
            for i in range(c.num_hidden_layers):
                layer = block(c.of_layer(i), name=f"layers_{i}")
                carry, _ = layer(carry, jnp.int32(i), positions, counts, angles)
        x, cache = carry
        if last_only and length > 1:
            x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
        x = norm(c, "final_norm")(x)
        logits = embed.attend(x) if c.tie_word_embeddings else Head(c, name="lm_head")(x)
        return logits if cache is None else (logits, cache.replace(offset=cache.offset + counts))


@dataclasses.dataclass(frozen=True)
class DecoderApply:
    """`Decoder(config).apply` as a function that compares equal for equal configurations, so that jit caches by it.

    Example:
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> DecoderApply(config) == DecoderApply(config)
        True
    """

    config: DecoderConfig

    def __call__(self, variables: PyTree, tokens: Int[Array, "batch length"], **kwargs: Any) -> Any:
        return Decoder(self.config).apply(variables, tokens, **kwargs)


@dataclasses.dataclass(frozen=True)
class EmbedApply:
    """`apply(params["embed"], tokens)`: the first residual stream, float32."""

    config: DecoderConfig

    def __call__(self, params: PyTree, tokens: Int[Array, "batch length"]) -> Hidden:
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        return Embed(self.config).apply({"params": params}, tokens, positions)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class BlockApply:
    """`apply(params["layers_3"], x)`: one layer without a cache, of `config.of_layer(3)`.

    Equal for equal configurations, so that layers of one width are one program.
    """

    config: DecoderConfig

    def __call__(self, params: PyTree, x: Hidden) -> Hidden:
        batch, length, _ = x.shape
        counts = jnp.full((batch,), length, jnp.int32)
        positions = jax.lax.broadcasted_iota(jnp.int32, (batch, length), 1)
        angles = rotary_angles(self.config, positions, counts)
        block = Block(self.config)
        (x, _), _ = block.apply({"params": params}, (x, None), jnp.int32(0), positions, counts, angles)  # type: ignore
        return x


GROUPS = (
    ("attention/q_proj/kernel", "attention/k_proj/kernel", "attention/v_proj/kernel"),
    ("attention/o_proj/kernel",),
    ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"),
    ("mlp/down_proj/kernel",),
)


def stages(config: DecoderConfig) -> tuple[Stage, ...]:
    """The parts of a decoder that data passes, for `compress_sequentially`: the embedding, then the layers.

    They compute in float32 and take unrolled parameters (`unstack_layers`); the final norm and the head, which are
    behind all blocks, are not among them.

    Example:
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> [stage.name for stage in stages(config)]
        ['embed', 'layers_0', 'layers_1']
    """
    config = dataclasses.replace(config, dtype="float32", scan_layers=False, remat=False)
    groups = tuple(tuple(path for path in group if not config.is_opt or "gate_proj" not in path) for group in GROUPS)
    layers = [
        Stage(name=f"layers_{i}", apply=BlockApply(config.of_layer(i)), groups=groups)
        for i in range(config.num_hidden_layers)
    ]
    return Stage(name="embed", apply=EmbedApply(config)), *layers


def new_cache(
    config: DecoderConfig,
    *,
    batch: int,
    slots: int | Sequence[int],
    dtype: Any = None,
    split: bool = False,
    importance: Importance = ATTENTION_RECEIVED,
    coders: KVCoders | NomadLayers | None = None,
) -> KVCache:
    """An empty cache that fits `config`; `dtype` defaults to the one computed in.

    `split` holds the layers apart (see `KVCache`), which decodes fastest; it needs `config.scan_layers` False, as do
    `slots` that differ from layer to layer. `importance` says what its scores are to mean. With `coders`
    (`effjax.kv.coders.fit_layers`) keys and values are held as codes, in a split cache; new tokens, those of prompts
    too, attend to what the codes stand for.

    Raises:
        ConfigError: see `init_cache`; or keys are coded before a rotation whose base grows with the text, which cannot
            be made up for when they are read.
    """
    turned = coders is not None and not coders.rotated
    if turned and config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        raise ConfigError(
            "new_cache: the rotation of this model changes with the length of the text (rope_type dynamic), so keys "
            "cannot be coded before it; choose a coding of rotated keys"
        )
    return init_cache(
        layers=config.num_hidden_layers,
        batch=batch,
        kv_heads=config.num_key_value_heads,
        slots=slots,
        head_dim=config.head_dim,
        dtype=dtype or config.dtype or config.param_dtype,
        split=split,
        importance=importance,
        coders=coders,
        frequencies=frequencies(config) if turned else None,
    )


def stack_layers(params: PyTree) -> PyTree:
    """`layers_0/...`, `layers_1/...` to `layers/...` with a leading layer axis (compressed leaves too).

    Raises:
        ConfigError: there is no `layers_0`, or a number is missing in between.
    """
    numbers = sorted(int(match[1]) for match in map(_LAYER.fullmatch, params) if match)
    if not numbers or numbers != list(range(len(numbers))):
        raise ConfigError(f"stack_layers: expected layers_0 and so on without a gap, found {sorted(params)}")
    rest = {name: value for name, value in params.items() if not _LAYER.fullmatch(name)}
    blocks = [params[f"layers_{i}"] for i in numbers]
    return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)} | rest


def unstack_layers(params: PyTree) -> PyTree:
    """The inverse of `stack_layers`.

    Raises:
        ConfigError: there is no `layers`.
    """
    if "layers" not in params:
        raise ConfigError(f"unstack_layers: expected layers/... with a leading layer axis, found {sorted(params)}")
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)} | rest


_LAYER = re.compile(r"layers_(\d+)")


def _check_shapes(config: DecoderConfig, tokens: Any, cache: Any, lengths: Any) -> tuple[int, int]:
    if tokens.ndim != 2:
        raise ConfigError(f"tokens must be [batch, length], found shape {tokens.shape}; add a batch axis")
    batch, length = tokens.shape
    if lengths is not None and lengths.shape != (batch,):
        raise ConfigError(f"lengths must be [batch] = [{batch}], found shape {lengths.shape}")
    if cache is not None:
        wanted = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            cache.slots,
            config.head_dim,
        )
        if cache.is_split and config.scan_layers:
            raise ConfigError(
                "the cache is split by layers but this model scans over them (scan_layers=True); join it with "
                "effjax.kv.cache.join_layers(cache)"
            )
        found = (len(cache.k), *cache.k[0].shape) if cache.is_split else cache.k.shape
        if not cache.is_even:
            found = (*found[:3], cache.slots, *found[4:])
        if found != wanted:
            raise ConfigError(
                f"the cache's keys are {list(found)} but this model and batch need {list(wanted)} "
                "(layers, batch, kv_heads, slots, head_dim); make it with new_cache(config, batch=..., slots=...)"
            )
    return batch, length
