"""Keys or values of one layer of a cache whose most recent tokens stay as they came, as KIVI holds them."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.kv.coding import At, Coded, Coder, Vectors
from effjax.ops.coded_slots import CodedSlots

SLOT = "slot"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedVectors:
    """Keys or values of one layer: codes, the scales that runs of tokens share, and the last tokens as they came.

    It stands in a split `KVCache` where else an array `[batch, kv_heads, slots, head_dim]` does, whose `shape` and
    `dtype` it has. A run is coded when its last token comes, and read as codes when `coding.coded` says so. Tokens of a
    run share scales, so that none can be evicted.

    Attributes:
        tokens: arrays `[batch, kv_heads, slots, width]`, see `effjax.kv.coding.Coded`.
        blocks: arrays `[batch, kv_heads, runs, head_dim]`; none where each token has its own scales.
        recent: `[batch, kv_heads, window, head_dim]`, slot `i` in row `i % window`.
        coding: `ChannelRuns`, or `PerToken` with a residual.
    """

    tokens: dict[str, Any]
    blocks: dict[str, Any]
    recent: Any
    coding: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors that are held."""
        return (*next(iter(self.tokens.values())).shape[:-1], self.recent.shape[-1])

    @property
    def dtype(self) -> Any:
        return self.recent.dtype

    def write(self, at: At, x: Float[Array, "batch kv_heads length head_dim"]) -> Self:
        """New tokens in the slots behind those that are filled; a slot out of range is dropped."""
        row, head, slot = at
        slots, window, run, length = self.shape[-2], self.coding.window, self.coding.run, x.shape[2]
        first = slot[..., 0]
        end = first + jnp.sum(slot < slots, axis=-1, dtype=jnp.int32)
        place = jnp.where((slot < slots) & (slot >= end[..., None] - window), slot % window, window)
        x = x.astype(self.dtype)
        recent = self.recent.at[row, head, place].set(x, mode="drop")

        # All runs that a new token can lie in, from the first token of the first: the ones before are in the window.
        shape = (*first.shape, ((length + run - 2) // run + 1) * run)
        where = (first // run * run)[..., None] + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        old = jnp.take_along_axis(self.recent, (where % window)[..., None], axis=2)
        new = jnp.take_along_axis(x, jnp.clip(where - first[..., None], 0, length - 1)[..., None], axis=2)
        vectors = jnp.where((where < first[..., None])[..., None], old, new)
        whole = where // run * run + run <= end[..., None]

        def encode(vectors: Array) -> Coded:
            return dataclasses.replace(self.coding, residual=0).encode(vectors)

        def nothing(vectors: Array) -> Coded:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(encode, vectors))

        # Most steps complete no run; what a step then costs is one vector.
        coded = encode(vectors) if length >= run else jax.lax.cond(jnp.any(whole), encode, nothing, vectors)
        return dataclasses.replace(
            self,
            tokens=_scattered(self.tokens, coded.tokens, jnp.where(whole, where, slots)),
            blocks=_scattered(self.blocks, coded.blocks, jnp.where(whole[..., ::run], where[..., ::run] // run, slots)),
            recent=recent,
        )

    def read(self, positions: Int[Array, "batch kv_heads slots"]) -> Vectors:
        """The vectors that attention works with: what codes stand for, and the last ones as they came."""
        slots = self.operand(positions)
        return slots.with_tokens(slots.tokens).astype(self.dtype)

    def operand(self, positions: Int[Array, "batch kv_heads slots"]) -> CodedSlots:
        """The same for `effjax.ops.decode_attention`, which decodes them piece by piece."""
        length = jnp.sum(positions >= 0, axis=-1, dtype=jnp.int32)
        slot = jax.lax.broadcasted_iota(jnp.int32, (*self.shape[:-1], 1), 2)
        reader = WindowReader(
            windowed=self.coding, blocks=self.blocks, recent=self.recent, coded=self.coding.coded(length)
        )
        return CodedSlots(coded=Coded(tokens={**self.tokens, SLOT: slot}), coder=reader)

    def resized(self, slots: int) -> Self:
        """The same tokens with room for `slots`."""

        def fit(x: Array, size: int) -> Array:
            kept = x[:, :, : min(size, x.shape[2])]
            return jnp.pad(kept, [(0, 0), (0, 0), (0, size - kept.shape[2]), (0, 0)])

        return dataclasses.replace(
            self,
            tokens={name: fit(x, slots) for name, x in self.tokens.items()},
            blocks={name: fit(x, _runs(slots, self.coding.run)) for name, x in self.blocks.items()},
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowReader:
    """A coder whose tokens have their slots beside their codes: of each it knows its scales, or how it came.

    Attributes:
        windowed: the coding.
        blocks, recent: as in `WindowedVectors`.
        coded: int32 `[batch, kv_heads]`, how many of the first slots are read as codes.
    """

    windowed: Any = dataclasses.field(metadata={"static": True})
    blocks: dict[str, Any]
    recent: Any
    coded: Any

    @property
    def coding(self) -> str:
        """A name: kernels know codings that stand alone, and leave the others to be decoded by blocks."""
        return f"{self.windowed} with recent tokens as they came"

    @property
    def tables(self) -> Any:
        return self.blocks, self.recent, self.coded

    def decode(self, coded: Coded) -> Vectors:
        """Vectors, float32."""
        tokens = dict(coded.tokens)
        slot = tokens.pop(SLOT)[..., 0]

        def at(x: Array, index: Array) -> Array:
            return jnp.take_along_axis(x, jnp.minimum(index, x.shape[2] - 1)[..., None], axis=2)

        scales = {name: at(x, slot // self.windowed.run) for name, x in self.blocks.items()}
        exact = at(self.recent, slot % self.windowed.window).astype(jnp.float32)
        return jnp.where((slot < self.coded[..., None])[..., None], self.windowed.of_tokens(tokens | scales), exact)


def empty_window(coder: Coder, shape: tuple[int, int, int, int], dtype: Any, frequencies: Any) -> WindowedVectors:
    """No token in slots for `shape` `[batch, kv_heads, slots, head_dim]`.

    Raises:
        ConfigError: keys that would be coded before their rotation.
    """
    coding = coder.coding
    if frequencies is not None:
        raise ConfigError(f"{coding}: its runs are of keys as they are multiplied; make the coders with rotated=True")
    batch, kv_heads, slots, head_dim = shape
    run = jax.ShapeDtypeStruct((batch, kv_heads, coding.run, head_dim), jnp.dtype(dtype))
    coded = jax.eval_shape(dataclasses.replace(coding, residual=0).encode, run)

    def rows(arrays: dict[str, Any], count: int) -> dict[str, Any]:
        return {name: jnp.zeros((batch, kv_heads, count, x.shape[-1]), x.dtype) for name, x in arrays.items()}

    return WindowedVectors(
        tokens=rows(coded.tokens, slots),
        blocks=rows(coded.blocks, _runs(slots, coding.run)),
        recent=jnp.zeros((batch, kv_heads, coding.window, head_dim), dtype),
        coding=coding,
    )


def _runs(slots: int, run: int) -> int:
    """Whole runs in so many slots; room for one at least, as nothing can be read from no rows."""
    return max(slots // run, 1)


def _scattered(old: dict[str, Any], new: dict[str, Any], to: Int[Array, "batch kv_heads count"]) -> dict[str, Any]:
    """Rows of `new` in the slots `to` of `old`; one beyond the last is dropped."""
    row, head = (jax.lax.broadcasted_iota(jnp.int32, to.shape, axis) for axis in (0, 1))
    return {name: x.at[row, head, to].set(new[name], mode="drop") for name, x in old.items()}
