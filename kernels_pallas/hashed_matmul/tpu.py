"""`x @ W` and `x @ W.T` on a TPU for a hashed matrix: nothing is read but the table, which stays in vector memory.

The slots of all entries are hashed anew in every step and looked up among the 128 lanes of each row of the table, so
the work grows with the table: what it saves is memory, never time. A gather from all of vector memory does not exist:
for v5e, v5p, v6e and 7x alike the compiler says "Only take_along_axis-like gathers supported", and to a table along
more than one register "Multiple source vregs along gather dimension" (`tests/aot/test_kernels.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from effjax.arrays.hashed import Hashed
from effjax.hashing.integers import mix
from kernels_pallas.frame import Operand, Weights, live_weights, multiply
from kernels_pallas.words import LANES, pad_to, round_up

MOST_SLOTS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one step of the grid multiplies: `rows` of activations, `spans` spans of `span` inputs, `out` outputs."""

    rows: int
    span: int
    spans: int
    out: int

    @property
    def inputs(self) -> int:
        return self.span * self.spans


def choose_tile(rows: int, x_dtype: Any, w: Hashed, *, transpose: bool = False) -> Tile:
    """The tile for `rows` rows of activations.

    Example:
        >>> w = Hashed(table=jnp.ones(512), seed=jnp.uint32(1), in_features=1024, out_features=1024)
        >>> choose_tile(1, jnp.bfloat16, w)
        Tile(rows=8, span=128, spans=4, out=256)
    """
    del transpose
    n, out = w.shape
    single = jnp.dtype(x_dtype) == jnp.float32
    spans = max(1, min(4, round_up(n, LANES) // LANES))
    most = 256 if single else 512
    return Tile(rows=min(most, round_up(rows, 8)), span=LANES, spans=spans, out=min(256, round_up(out, LANES)))


def vmem_bytes(tile: Tile, x_dtype: Any, w: Hashed, *, transpose: bool = False) -> int:
    """Vector memory of a step: every block twice, since the next one is on its way, and what a span is hashed to."""
    item = jnp.dtype(x_dtype).itemsize
    table = 4 * round_up(w.table.shape[-1], 8 * LANES)
    wide = tile.rows * max(tile.inputs if transpose else tile.out, LANES)
    activations = tile.rows * item * (tile.out if transpose else tile.inputs)
    hashed = live_weights(tile) * (6 * 4 + item) + 4 * wide
    return 2 * (table + activations + 4 * wide) + 2 * hashed


def why_not(rows: int, x_dtype: Any, w: Hashed, *, transpose: bool = False) -> str:
    """Why this product is not one for this kernel; empty where it is.

    Example:
        >>> w = Hashed(table=jnp.ones(4096), seed=jnp.uint32(1), in_features=256, out_features=256)
        >>> why_not(1, jnp.bfloat16, w)
        'a table of 4096 slots: the vector unit looks up among 128 lanes at a time, which is done for up to 2048 slots'
    """
    del transpose
    if len(w.shape) != 2:
        return f"a stack of matrices {list(w.shape)}: map over the leading axes"
    if jnp.dtype(x_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"activations in {jnp.dtype(x_dtype).name}: only bfloat16 and float32"
    if rows < 1:
        return "no rows"
    if w.table.shape[-1] > MOST_SLOTS:
        return (
            f"a table of {w.table.shape[-1]} slots: the vector unit looks up among {LANES} lanes at a time, "
            f"which is done for up to {MOST_SLOTS} slots"
        )
    return ""


def hashed_matmul(
    x: Float[Array, "rows in"],
    w: Hashed,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """Multiplies by a hashed matrix without ever writing it to memory.

    Args:
        x: `[rows, in]`, or `[rows, out]` when `transpose`; bfloat16 or float32.
        w: `[in, out]` with a table of up to `MOST_SLOTS` slots.
        transpose: multiply by `W.T`: the gradient with respect to the inputs.
        tile: what a step takes; chosen by `choose_tile` where None.
        interpret: run on the CPU in the simulator of a TPU.

    Returns:
        float32 `[rows, out]`, or `[rows, in]` when `transpose`. Slots are rounded to the dtype of `x`.

    Raises:
        ValueError: what `why_not` says.

    Example:
        >>> w = Hashed(table=jnp.ones(256), seed=jnp.uint32(1), in_features=64, out_features=64)
        >>> hashed_matmul(jnp.ones((1, 64)), w, interpret=True).shape
        (1, 64)
    """
    reason = why_not(x.shape[0], x.dtype, w, transpose=transpose)
    if reason:
        raise ValueError(f"the TPU's hashed_matmul does not take {w}: {reason}; use implementation='reference'")
    tile = choose_tile(x.shape[0], x.dtype, w, transpose=transpose) if tile is None else tile
    return multiply(x, _weights(x, w, tile, transpose), tile, transpose=transpose, interpret=interpret)


def _weights(x: jax.Array, w: Hashed, tile: Tile, transpose: bool) -> Weights:
    table = pad_to(w.table.astype(jnp.float32), LANES).reshape(-1, LANES)
    seed = lax.bitcast_convert_type(w.seed, jnp.int32).reshape(1, 1)

    def dense(stored: Any, scratch: Any, s: Any, k: Any, j: Any, dtype: Any) -> jax.Array:
        shape = (tile.span, tile.out)
        row = lax.broadcasted_iota(jnp.int32, shape, 0) + (k * tile.inputs + s * tile.span)
        column = lax.broadcasted_iota(jnp.int32, shape, 1) + j * tile.out
        slot, negative = _slots(jnp.full(shape, stored[1][0, 0], jnp.int32), row, column, w)
        value = jnp.zeros(shape, jnp.float32)
        lane, line = slot & jnp.int32(LANES - 1), lax.shift_right_logical(slot, jnp.int32(7))
        for index in range(table.shape[0]):
            source = jnp.broadcast_to(stored[0][index : index + 1, :], (tile.span, LANES))
            found = jnp.take_along_axis(source, lane, axis=1, mode="promise_in_bounds")
            value = jnp.where(line == index, found, value)
        return jnp.where(negative, -value, value).astype(dtype)

    return Weights(
        shape=w.shape,
        operands=[
            Operand(array=table, block=table.shape, at=lambda k, j: (0, 0)),
            Operand(array=seed, block=(1, 1), at=lambda k, j: (0, 0), space=pltpu.SMEM),
        ],
        factors=(tile.span,),
        order=(0,),
        start=lambda stored, scratch, k, j: None,
        dense=dense,
        scratch=[],
        vmem=vmem_bytes(tile, x.dtype, w, transpose=transpose),
        nbytes=w.nbytes,
        name="hashed_matmul",
    )


def _slots(seed: jax.Array, row: jax.Array, column: jax.Array, w: Hashed) -> tuple[jax.Array, jax.Array]:
    """`effjax.arrays.hashed.slots_and_signs` for a tile: the slot, int32, and whether the sign is negative."""

    def unsigned(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.uint32)

    run = column if w.block == 1 else lax.div(column, jnp.int32(w.block))
    offset = jnp.zeros_like(column) if w.block == 1 else column - run * w.block
    row_hash = mix(unsigned(row) * jnp.uint32(0x9E3779B1) + unsigned(seed))
    slot = (mix(row_hash ^ (unsigned(run) * jnp.uint32(0x85157AF5))) + unsigned(offset)) % jnp.uint32(w.table.shape[-1])
    sign = mix(row_hash + unsigned(column) * jnp.uint32(0xC2B2AE3D) + jnp.uint32(0x27D4EB2F))
    return lax.bitcast_convert_type(slot, jnp.int32), lax.bitcast_convert_type(sign, jnp.int32) < 0
