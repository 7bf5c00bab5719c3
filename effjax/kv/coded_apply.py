"""A decoder whose keys and values are those that their codes stand for: what a coding costs, before any cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from effjax.errors import ConfigError
from effjax.kv.capture import CapturedKV, Part, changed_kv
from effjax.kv.coding import Coder, KVCoding, fit
from effjax.models.config import DecoderConfig
from effjax.models.rope import rotary_angles, rotate

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCoders:
    """The coders of all layers.

    Attributes:
        keys, values: one `Coder` a layer; None leaves a layer's keys or values as they are.
        rotated: keys are coded after the rotation.
        exact: so many first tokens of a text are not coded. Others do not share scales with them.
    """

    keys: tuple[Coder | None, ...]
    values: tuple[Coder | None, ...]
    rotated: bool = dataclasses.field(default=False, metadata={"static": True})
    exact: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(coder.nbytes for coder in (*self.keys, *self.values) if coder is not None)

    def bits_per_channel(self, shape: tuple[int, ...], *, tables: bool = True, dtype: Any = jnp.float16) -> float:
        """The mean of all coders over a cache of `shape` a layer, see `Coder.bits_per_channel`."""
        coders = [coder for coder in (*self.keys, *self.values) if coder is not None]
        return sum(coder.bits_per_channel(shape, tables=tables, dtype=dtype) for coder in coders) / len(coders)


def fit_layers(
    method: KVCoding, captured: CapturedKV, *, key: Key[Array, ""], exact: int = 0, leave: tuple[int, ...] = ()
) -> KVCoders:
    """Learns the tables of every layer.

    Args:
        method: such as `CQ(channels=8, bits=8)`.
        captured: keys, values and gradients of the calibration text.
        key: of the draws of k-means; each layer, and keys and values, get their own.
        exact: see `KVCoders`; leave these tokens out of `captured` as well.
        leave: layers that are not coded.

    Raises:
        ConfigError: a layer to leave does not exist, or see the method.
    """
    layers = captured.keys.shape[0]
    if unknown := [layer for layer in leave if not 0 <= layer < layers]:
        raise ConfigError(f"leave={leave}: the model has layers 0 to {layers - 1}, not {unknown}")

    def learned(part: str, coding: Any, x: Array, grads: Array) -> tuple[Coder | None, ...]:
        keys = jax.random.split(jax.random.fold_in(key, part == "values"), layers)
        return tuple(None if i in leave else fit(coding, x[i], grads[i], key=keys[i]) for i in range(layers))

    return KVCoders(
        keys=learned("keys", method.keys, captured.keys, captured.key_grads),
        values=learned("values", method.values, captured.values, captured.value_grads),
        rotated=method.rotated,
        exact=exact,
    )


def apply_coded(
    config: DecoderConfig, params: PyTree, coders: KVCoders, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """Logits of whole texts, all of whose keys and values were coded and decoded: also those that a prompt reads.

    Raises:
        ConfigError: there is not one coder for each layer.

    Example:
        >>> from effjax.kv.integer import IntKV
        >>> from effjax.kv.capture import capture_kv
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> tokens = jnp.arange(24).reshape(3, 8)
        >>> params = Decoder(config).init(jax.random.key(0), tokens)["params"]
        >>> captured = capture_kv(config, params, tokens)
        >>> coders = fit_layers(IntKV(bits=8, head_dim=8), captured, key=jax.random.key(1))
        >>> apply_coded(config, params, coders, tokens).shape
        (3, 8, 256)
    """
    if not len(coders.keys) == len(coders.values) == config.num_hidden_layers:
        raise ConfigError(
            f"there are coders for {len(coders.keys)} layers, the model has {config.num_hidden_layers}; learn them "
            "with fit_layers on this model"
        )
    batch, length = tokens.shape
    positions = jax.lax.broadcasted_iota(jnp.int32, (batch, length), 1)
    cos, sin = rotary_angles(config, positions, jnp.full((batch,), length, jnp.int32))

    def turned(x: Array, sin: Array) -> Array:
        return rotate(x.swapaxes(1, 2), cos, sin).swapaxes(1, 2)

    def change(layer: int, part: Part, x: Array) -> Array:
        coder = (coders.keys if part == "keys" else coders.values)[layer]
        if coder is None:
            return x
        y = turned(x, sin) if part == "keys" and coders.rotated else x
        early = jax.lax.broadcasted_iota(jnp.int32, y.shape, 2) < coders.exact
        y = jnp.where(early, y[:, :, coders.exact : coders.exact + 1], y)  # out of ranges that tokens share
        decoded = coder.decode(coder.encode(y)).astype(x.dtype)
        decoded = turned(decoded, -sin) if part == "keys" and coders.rotated else decoded
        return jnp.where(early, x, decoded)

    return changed_kv(config, change)({"params": params}, tokens)
