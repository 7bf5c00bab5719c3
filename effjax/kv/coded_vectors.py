"""Keys or values of one layer of a cache, held as codes."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.kv.coding import At, Coded, Coder, Vectors
from effjax.kv.windowed_vectors import WindowedVectors, empty_window
from effjax.models.rope import rotate
from effjax.ops.coded_slots import CodedSlots

POSITIONS = "positions"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedVectors:
    """Keys or values of one layer, held as codes.

    It stands in a split `KVCache` where else an array `[batch, kv_heads, slots, head_dim]` does, whose `shape` and
    `dtype` it has. Codes are those of single tokens, so that a slot is written when its token comes and may move when
    others are evicted.

    Attributes:
        tokens: arrays `[batch, kv_heads, slots, width]`, see `effjax.kv.coding.Coded`.
        coder: the coding and its tables.
        frequencies: float32 `[head_dim / 2]`, radians a position, of keys that are coded before their rotation: they
            are turned when they are read. None for values, and for keys that are coded as they came.
        head_dim: of the vectors.
        dtype: of the vectors that are read.
    """

    tokens: dict[str, Any]
    coder: Coder
    frequencies: Any = None
    head_dim: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors that the codes stand for."""
        return (*next(iter(self.tokens.values())).shape[:-1], self.head_dim)

    def write(self, at: At, x: Float[Array, "batch kv_heads length head_dim"]) -> Self:
        """Codes of new tokens in their slots; a slot out of range is dropped."""
        new = self.coder.encode(x).tokens
        return dataclasses.replace(
            self, tokens={name: old.at[at].set(new[name], mode="drop") for name, old in self.tokens.items()}
        )

    def read(self, positions: Int[Array, "batch kv_heads slots"]) -> Vectors:
        """The vectors that the codes stand for; keys turned to the positions of their tokens."""
        slots = self.operand(positions)
        return slots.with_tokens(slots.tokens).astype(self.dtype)

    def operand(self, positions: Int[Array, "batch kv_heads slots"]) -> CodedSlots:
        """The same for `effjax.ops.decode_attention`, which decodes and turns them piece by piece."""
        if self.frequencies is None:
            return CodedSlots(coded=Coded(tokens=self.tokens), coder=self.coder)
        turning = TurningCoder(coder=self.coder, frequencies=self.frequencies)
        return CodedSlots(coded=Coded(tokens={**self.tokens, POSITIONS: positions[..., None]}), coder=turning)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TurningCoder:
    """A coder of keys before rotation whose tokens have their positions beside their codes: keys come back turned.

    Attributes:
        coder: of the keys before rotation.
        frequencies: as in `CodedVectors`.
    """

    coder: Coder
    frequencies: Any

    @property
    def coding(self) -> str:
        """A name: kernels know codings that need no rotation, and leave the others to be decoded by blocks."""
        return f"{self.coder.coding} before rotation"

    @property
    def tables(self) -> Any:
        return self.coder.tables

    def decode(self, coded: Coded) -> Vectors:
        """Keys, float32, turned to their positions."""
        tokens = dict(coded.tokens)
        positions = tokens.pop(POSITIONS)
        x = self.coder.decode(Coded(tokens=tokens))
        angles = positions.reshape(-1, x.shape[-2], 1).astype(jnp.float32) * self.frequencies
        rows = x.reshape(-1, x.shape[-2], 1, x.shape[-1])
        return rotate(rows, jnp.cos(angles), jnp.sin(angles)).reshape(x.shape)


def empty_slots(
    coder: Coder, shape: tuple[int, int, int, int], dtype: Any, frequencies: Float[Array, " half"] | None = None
) -> CodedVectors | WindowedVectors:
    """No token in slots for `shape` `[batch, kv_heads, slots, head_dim]`.

    Tables are copied: the memory of a cache is reused where it is donated, and that of the coder must not be.

    Raises:
        ConfigError: tables of other heads; or a coding of keys before their rotation whose successive tokens share
            scales.
    """
    try:
        coded = jax.eval_shape(coder.encode, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        decoded = jax.eval_shape(coder.decode, coded)
    except (TypeError, ValueError) as error:  # shapes that do not broadcast
        decoded, reason = None, str(error)
    else:
        reason = f"they decode to {list(decoded.shape)}"
    if decoded is None or decoded.shape != shape:
        raise ConfigError(
            f"{coder.coding}: its tables do not fit vectors {list(shape)} (batch, kv_heads, slots, head_dim): "
            f"{reason}; learn them on this model"
        )
    if getattr(coder.coding, "window", 0):
        return empty_window(coder, shape, dtype, frequencies)
    return CodedVectors(
        tokens={name: jnp.zeros(x.shape, x.dtype) for name, x in coded.tokens.items()},
        coder=jax.tree.map(lambda x: jnp.array(x, copy=True), coder),
        frequencies=None if frequencies is None else jnp.array(frequencies, copy=True),
        head_dim=shape[-1],
        dtype=jnp.dtype(dtype),
    )
