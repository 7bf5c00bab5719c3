"""What a cache does with the keys or values of one layer, whether an array holds them or codes do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.kv.coded_vectors import CodedVectors
from effjax.kv.coding import At
from effjax.kv.nomad_slots import NomadSlots
from effjax.kv.windowed_vectors import WindowedVectors


def is_coded(held: Any) -> bool:
    """Whether codes hold them."""
    return isinstance(held, CodedVectors | NomadSlots | WindowedVectors)


def write_slots(held: Any, at: At, x: Float[Array, "batch kv_heads length head_dim"]) -> Any:
    """New tokens in their slots; a slot out of range is dropped."""
    if is_coded(held):
        return held.write(at, x)
    return held.at[at].set(x.astype(held.dtype), mode="drop")


def read_slots(
    held: Any, positions: Int[Array, "batch kv_heads slots"]
) -> Float[Array, "batch kv_heads slots head_dim"]:
    """The vectors in all slots."""
    return held.read(positions) if is_coded(held) else held


def take_slots(
    held: Any,
    order: Int[Array, "batch kv_heads kept"],
    filled: Bool[Array, "batch kv_heads kept"],
    before: Int[Array, "batch kv_heads"],
    slots: int,
) -> Any:
    """What lies in the slots of `order`, as far as they are `filled`, in `slots` slots; `before` were filled before.

    Raises:
        ConfigError: successive tokens share scales, or the last ones are not coded.
    """
    if isinstance(held, WindowedVectors):
        raise ConfigError(
            f"{held.coding}: nothing can be evicted, as successive tokens share scales or the last ones are not coded; "
            "choose CQ, KVQuant or IntKV, or evict nothing"
        )
    if isinstance(held, NomadSlots):
        return held.take(order, filled, before, slots)

    def taken(x: Array) -> Array:
        return jnp.where(filled[..., None], jnp.take_along_axis(x, order[..., None], axis=-2), jnp.zeros((), x.dtype))

    return resize_slots(_changed(held, taken), slots)


def resize_slots(held: Any, slots: int) -> Any:
    """The first `slots` slots, with empty ones behind where there were fewer."""
    if isinstance(held, NomadSlots | WindowedVectors):
        return held.resized(slots)

    def fit(x: Array) -> Array:
        kept = jax.lax.slice_in_dim(x, 0, min(slots, x.shape[-2]), axis=-2)
        return jnp.pad(kept, [(0, 0)] * (x.ndim - 2) + [(0, max(slots - x.shape[-2], 0)), (0, 0)])

    return _changed(held, fit)


def _changed(held: Any, change: Callable[[Array], Array]) -> Any:
    """`change` of every array whose last axis but one is that of the slots; tables stay as they are."""
    if isinstance(held, CodedVectors):
        return dataclasses.replace(held, tokens={name: change(x) for name, x in held.tokens.items()})
    return change(held)
