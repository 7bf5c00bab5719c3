"""The coders of all layers of a model: a coding with the tables that each layer's keys and values gave."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from effjax.errors import ConfigError
from effjax.kv.coded_vectors import empty_slots
from effjax.kv.coding import Coder, KVCoding, fit
from effjax.kv.nomad_slots import NomadLayers

if TYPE_CHECKING:
    from effjax.kv.capture import CapturedKV


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
    def layers(self) -> int:
        if len(self.keys) != len(self.values):
            raise ConfigError(
                f"there are coders for the keys of {len(self.keys)} layers and the values of {len(self.values)}"
            )
        return len(self.keys)

    def empty_keys(self, layer: int, shape: tuple[int, int, int, int], dtype: Any, frequencies: Any) -> Any:
        """No key in slots for `shape` `[batch, kv_heads, slots, head_dim]`, see `empty_slots`."""
        coder = self.keys[layer]
        turns = None if self.rotated else frequencies
        return jnp.zeros(shape, dtype) if coder is None else empty_slots(coder, shape, dtype, turns)

    def empty_values(self, layer: int, shape: tuple[int, int, int, int], dtype: Any) -> Any:
        """The same for values."""
        coder = self.values[layer]
        return jnp.zeros(shape, dtype) if coder is None else empty_slots(coder, shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(coder.nbytes for coder in (*self.keys, *self.values) if coder is not None)

    def bits_per_channel(self, shape: tuple[int, ...], *, tables: bool = True, dtype: Any = jnp.float16) -> float:
        """The mean of all coders over a cache of `shape` a layer, see `Coder.bits_per_channel`."""
        coders = [coder for coder in (*self.keys, *self.values) if coder is not None]
        return sum(coder.bits_per_channel(shape, tables=tables, dtype=dtype) for coder in coders) / len(coders)


def fit_layers(
    method: KVCoding, captured: "CapturedKV", *, key: Key[Array, ""], exact: int = 0, leave: tuple[int, ...] = ()
) -> KVCoders:
    """Learns the tables of every layer.

    Args:
        method: such as `CQ(channels=8, bits=8)`.
        captured: keys, values and gradients of the calibration text (`effjax.kv.capture.capture_kv`).
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


def check_layers(coders: KVCoders | NomadLayers, layers: int) -> None:
    """Raises ConfigError where there is not one coder for each layer."""
    if coders.layers != layers:
        raise ConfigError(
            f"there are coders for {coders.layers} layers, the model has {layers}; learn them with fit_layers on "
            "this model"
        )
