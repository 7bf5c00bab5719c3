"""Some neurons of an MLP on a Hopper GPU: each row is read straight into the registers of a warpgroup, and no other.

A step of decoding waits for memory, so tensor cores would not help. A block of threads takes some neurons at a time:
it loads their rows one behind the other, so that all are on their way together, sums their products with the input,
and adds rows of `down` to sums that stay in its registers. Sums of the blocks are added afterwards, in a fixed order.
A chosen neuron is a row by itself, so that blocks of neighbours (`block`) are no faster than neurons far apart.

Source: the gathered products of Deja Vu (Liu et al. 2023, section 4.4), here fused to one kernel.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.gpu_tile import MULTIPROCESSORS

# Those of `jax.nn` have derivatives of their own, which Mosaic GPU does not lower.
ACTIVATIONS = {
    "relu": lambda z: jnp.maximum(z, 0.0),
    "silu": lambda z: z * lax.logistic(z),
    "gelu": lambda z: 0.5 * z * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))),
}
DTYPES = ("float32", "bfloat16")
THREADS = 128  # of a warpgroup
ROW_REGISTERS = 128  # a thread has for rows on their way, of 255
MOST_WIDTH = 16384  # inputs and outputs together: a thread has a register for every 128 of either


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How the chosen neurons are shared.

    Attributes:
        shares: blocks of threads that share them.
        neurons: how many a block takes at a time.
    """

    shares: int
    neurons: int

    def __post_init__(self) -> None:
        if self.shares < 1 or self.neurons < 1:
            raise ValueError(f"shares={self.shares}, neurons={self.neurons}: both are at least 1")


def choose_tile(rows: int, neurons: Any, chosen: int, *, multiprocessors: int = MULTIPROCESSORS) -> Tile:
    """As many neurons at a time as fit the registers, and two blocks of threads for every multiprocessor.

    Args:
        rows: of `x`.
        neurons: the MLP, or its abstract shape.
        chosen: how many neurons.
        multiprocessors: of the GPU.
    """
    of_a_neuron = neurons.weights_per_neuron * jnp.dtype(neurons.up.dtype).itemsize
    registers = of_a_neuron // (4 * THREADS)
    together = next(n for n in (8, 4, 2, 1) if n * registers <= ROW_REGISTERS or n == 1)
    most = max(1, 2 * multiprocessors // rows)
    return Tile(shares=max(1, min(most, -(-chosen // together))), neurons=together)


def why_not(x_dtype: Any, neurons: Any) -> str:
    """Why the kernel does not take these operands (`effjax.ops.neurons.Neurons`), in a sentence; else empty."""
    if not hasattr(neurons.up, "dtype") or jnp.dtype(neurons.up.dtype).name not in DTYPES:
        return "the GPU's kernel reads rows of float32 or bfloat16"
    if jnp.dtype(x_dtype).name not in DTYPES:
        return f"activations in {jnp.dtype(x_dtype).name}: only bfloat16 and float32"
    widths = neurons.up.shape[1], neurons.down.shape[1]
    if any(width % THREADS for width in widths):
        return f"widths {widths[0]} and {widths[1]}: only multiples of {THREADS}"
    if sum(widths) > MOST_WIDTH:
        return f"widths {widths[0]} and {widths[1]}: registers hold {MOST_WIDTH} together"
    return ""


def sparse_mlp(
    x: Float[Array, "batch in"],
    neurons: Any,
    chosen: Int32[Array, " k"],
    count: Int32[Array, ""],
    *,
    block: int,
    tile: Tile | None = None,
    interpret: Any = False,
) -> Float[Array, "batch out"]:
    """See `effjax.ops.sparse_mlp`; products and sums in float32.

    Args:
        x: as few rows as decode together: each of them reads the neurons again, from the second-level cache.
        neurons: with rows of float32 or bfloat16.
        chosen: blocks.
        count: how many of them count.
        block: neurons each.
        tile: how neurons are shared; `choose_tile` decides where None.
        interpret: parameters of Mosaic GPU's interpreter, for tests.

    Raises:
        ValueError: what `why_not` says.
    """
    if reason := why_not(x.dtype, neurons):
        raise ValueError(f"the GPU's sparse_mlp does not take this: {reason}; use implementation='reference'")
    (total, inputs), out, rows = neurons.up.shape, neurons.down.shape[1], x.shape[0]
    last = jnp.zeros(out) if neurons.down_bias is None else neurons.down_bias
    places = len(chosen) * block
    if places == 0 or rows == 0:
        return jnp.broadcast_to(last, (rows, out))
    tile = tile or choose_tile(rows, neurons, places)
    gated = neurons.gate is not None
    biases = [neurons.up_bias, *([neurons.gate_bias] if gated else [])]
    act, shift = ACTIVATIONS[neurons.activation], neurons.shift

    def strided(width: int) -> Any:
        """16 bytes of the weights a thread, or the most that the width allows."""
        most = 16 // jnp.dtype(neurons.up.dtype).itemsize
        vector = next(v for v in (8, 4, 2, 1) if v <= most and width % (v * THREADS) == 0)
        return plgpu.Layout.WG_STRIDED((width,), vector)

    def kernel(count_gmem: Any, chosen_gmem: Any, x_gmem: Any, *refs: Any) -> None:
        given, refs = iter(refs), refs[sum(bias is not None for bias in biases) :]
        bias_gmem = [None if bias is None else next(given) for bias in biases]
        *matrices, out_gmem = refs
        share, row = lax.axis_index("shares"), lax.axis_index("rows")
        used = jnp.minimum(count_gmem[0], len(chosen)) * block

        def read(ref: Any, place: Any, width: int) -> jax.Array:
            return plgpu.layout_cast(ref[place, :], strided(width))

        def wide(x: jax.Array) -> jax.Array:
            return x.astype(jnp.float32)

        question = wide(read(x_gmem, row, inputs))

        def step(i: Any, sums: jax.Array) -> jax.Array:
            first = (i * tile.shares + share) * tile.neurons
            places, live = [], []
            for j in range(tile.neurons):
                at = jnp.minimum(first + j, used - 1)
                number = chosen_gmem[lax.div(at, jnp.int32(block))]
                exists = (number >= 0) & (number < total // block)
                live.append(exists & (first + j < used))
                places.append(jnp.where(exists, number, 0) * block + lax.rem(at, jnp.int32(block)))
            # All loads stand before the first sum, where warps wait for each other.
            widths = [inputs] * (len(matrices) - 1) + [out]
            *found, down = [[read(m, place, w) for place in places] for m, w in zip(matrices, widths, strict=True)]
            added = [[0.0 if ref is None else ref[place] for place in places] for ref in bias_gmem]
            products = [[jnp.sum(wide(each) * question) for each in matrix] for matrix in found]
            for j in range(tile.neurons):
                z, *gate = [product[j] + bias[j] for product, bias in zip(products, added, strict=True)]
                h = act(gate[0] - shift) * z if gated else act(z - shift)
                sums = sums + jnp.where(live[j], h, 0.0) * wide(down[j])
            return sums

        steps = lax.div(used + (tile.neurons - 1), jnp.int32(tile.neurons))
        mine = lax.div(jnp.maximum(steps - share + (tile.shares - 1), 0), jnp.int32(tile.shares))
        zeros = plgpu.layout_cast(jnp.zeros((out,), jnp.float32), strided(out))
        out_gmem[share, row, :] = lax.fori_loop(0, mine, step, zeros)

    operands = [neurons.up, *([neurons.gate] if gated else []), neurons.down]
    shares = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tile.shares, rows, out), jnp.float32),
        grid=(tile.shares, rows),
        grid_names=("shares", "rows"),
        interpret=interpret or None,
    )(count.reshape(1), chosen, x, *(bias for bias in biases if bias is not None), *operands)
    return shares.sum(0) + last
