"""Some blocks of neurons of an MLP on a TPU: their numbers are prefetched, so that no other block is brought.

A block's rows of each matrix are one copy, which the pipeline starts while the block before is computed. Behind the
last block that counts its copy is named again, which moves nothing. Neurons that fire together should be neighbours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.frame import dot, simulator
from kernels_pallas.words import pad_to, round_up

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": jax.nn.gelu}
LEAST_BLOCK = {"float32": 8, "bfloat16": 16}  # rows of a register
MOST_VMEM = 32 * 2**20


def vmem_bytes(rows: int, neurons: Any, block: int) -> int:
    """Vector memory of a step: the rows of a block twice, inputs, activations and sums."""
    inputs, out = neurons.up.shape[1], neurons.down.shape[1]
    matrices = block * (out + inputs * (1 if neurons.gate is None else 2)) * neurons.up.dtype.itemsize
    wide, lanes = round_up(rows, 16), max(block, 128)
    few = 4 * (wide * (inputs + out + 4 * lanes) + 8 * lanes)  # the last: biases, in a register's eight rows
    return 2 * (matrices + few) + 2**20


def why_not(x_dtype: Any, neurons: Any, block: int) -> str:
    """Why the kernel does not take these operands (`effjax.ops.neurons.Neurons`), in a sentence; else empty."""
    if not hasattr(neurons.up, "dtype") or jnp.dtype(neurons.up.dtype).name not in LEAST_BLOCK:
        return "the TPU's kernel reads rows of float32 or bfloat16"
    least = LEAST_BLOCK[jnp.dtype(neurons.up.dtype).name]
    if block % least:
        return f"block={block}: the TPU's kernel brings blocks of a multiple of {least} neurons"
    if jnp.dtype(x_dtype).name not in LEAST_BLOCK:
        return f"activations in {jnp.dtype(x_dtype).name}: only bfloat16 and float32"
    if neurons.up.shape[1] % 128 or neurons.down.shape[1] % 128:
        return f"widths {neurons.up.shape[1]} and {neurons.down.shape[1]}: only multiples of 128"
    if vmem_bytes(1, neurons, block) > MOST_VMEM:
        return f"block={block} of these widths does not fit the vector memory; choose smaller blocks"
    return ""


def sparse_mlp(
    x: Float[Array, "batch in"],
    neurons: Any,
    chosen: Int32[Array, " k"],
    count: Int32[Array, ""],
    *,
    block: int,
    interpret: bool = False,
) -> Float[Array, "batch out"]:
    """See `effjax.ops.sparse_mlp`; products of inputs rounded to the dtype of the weights, sums in float32.

    Args:
        x: as few rows as decode together: all of them are in vector memory.
        neurons: with rows of float32 or bfloat16.
        chosen: blocks.
        count: how many of them count.
        block: neurons each.
        interpret: run on the CPU in the simulator of a TPU.

    Raises:
        ValueError: what `why_not` says.

    Example:
        >>> from effjax.ops.neurons import make_neurons
        >>> neurons = make_neurons(jnp.ones((128, 16)), jnp.ones((16, 128)))
        >>> sparse_mlp(jnp.ones((1, 128)), neurons, jnp.array([1]), jnp.int32(1), block=8, interpret=True)[0, 0]
        Array(1024., dtype=float32)
    """
    if reason := why_not(x.dtype, neurons, block):
        raise ValueError(f"the TPU's sparse_mlp does not take this: {reason}; use implementation='reference'")
    (total, inputs), out, dtype = neurons.up.shape, neurons.down.shape[1], neurons.up.dtype
    rows, steps = x.shape[0], len(chosen)
    last = jnp.zeros(out) if neurons.down_bias is None else neurons.down_bias
    if steps == 0:
        return jnp.broadcast_to(last, (rows, out))
    x = pad_to(x.astype(dtype), LEAST_BLOCK[jnp.dtype(dtype).name], inputs)
    blocks = total // block
    # A block that is not there adds nothing, and stands behind the others.
    valid = (jnp.arange(steps) < count) & (chosen >= 0) & (chosen < blocks)
    chosen = jnp.clip(chosen[jnp.argsort(~valid, stable=True)], 0, blocks - 1).astype(jnp.int32)
    count = valid.sum(dtype=jnp.int32).reshape(1)
    gated = neurons.gate is not None
    given = [neurons.up_bias, *([neurons.gate_bias] if gated else [])]
    biases = jnp.stack([jnp.zeros(total) if b is None else b for b in given])  # of up and gate, for one copy a block
    act, shift = ACTIVATIONS[neurons.activation], neurons.shift

    def at(i: Any, chosen_ref: Any, count_ref: Any) -> Any:
        return chosen_ref[jnp.minimum(i, jnp.maximum(count_ref[0] - 1, 0))]

    def kernel(chosen_ref: Any, count_ref: Any, x_ref: Any, last_ref: Any, bias_ref: Any, *refs: Any) -> None:
        *matrices, y_ref = refs
        i = pl.program_id(0)

        @pl.when(i == 0)
        def _() -> None:
            y_ref[...] = jnp.broadcast_to(last_ref[...], y_ref.shape)

        @pl.when(i < count_ref[0])
        def _() -> None:
            z = dot(x_ref[...], matrices[0][...], 1) + bias_ref[0, :1]
            h = act(dot(x_ref[...], matrices[1][...], 1) + bias_ref[0, 1:] - shift) * z if gated else act(z - shift)
            y_ref[...] += dot(h.astype(dtype), matrices[-1][...], 0)

    def matrix(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, width), lambda i, *refs: (at(i, *refs), 0))

    operands = [neurons.up, *([neurons.gate] if gated else []), neurons.down]
    moved = steps * block * sum(m.shape[1] for m in operands) * jnp.dtype(dtype).itemsize
    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec(x.shape, lambda i, *_: (0, 0)),
                pl.BlockSpec((1, out), lambda i, *_: (0, 0)),
                pl.BlockSpec((1, len(given), block), lambda i, *refs: (at(i, *refs), 0, 0)),
                *(matrix(m.shape[1]) for m in operands),
            ],
            out_specs=pl.BlockSpec((x.shape[0], out), lambda i, *_: (0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_bytes(rows, neurons, block)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * steps * block * sum(m.shape[1] for m in operands),
            bytes_accessed=moved,
            transcendentals=rows * steps * block,
        ),
        interpret=simulator(interpret),
        name="sparse_mlp",
    )(chosen, count, x, last.reshape(1, out), biases.reshape(-1, blocks, block).swapaxes(0, 1), *operands)
    return y[:rows]
