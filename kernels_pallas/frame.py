"""The grid that products with weights made in vector memory share: tiles, accumulation, and the order of inputs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.words import from_planes, pad_to, round_up, to_planes


class Tile(Protocol):
    """`rows` of activations, `spans` spans of `span` inputs each, and `out` outputs a step."""

    @property
    def rows(self) -> int: ...
    @property
    def span(self) -> int: ...
    @property
    def spans(self) -> int: ...
    @property
    def out(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """A stored part of the weights, and its block for input tile `k` and output tile `j`.

    Attributes:
        array: as it lies in memory.
        block: shape of the block.
        at: `at(k, j)` -> the block's indices, in blocks.
        space: None for vector memory, or `pltpu.SMEM`.
    """

    array: jax.Array
    block: tuple[int, ...]
    at: Callable[[Any, Any], tuple[Any, ...]]
    space: Any = None

    def spec(self, order: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple[Any, ...]:
            return self.at(*order(*grid))

        return (
            pl.BlockSpec(self.block, index)
            if self.space is None
            else pl.BlockSpec(self.block, index, memory_space=self.space)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """How a kernel makes its weights.

    Attributes:
        shape: `(in, out)`.
        operands: what is stored.
        factors, order: of a span's inputs, as for `to_planes`.
        start: `start(operand_refs, scratch_refs, k, j)`, once a step.
        dense: `dense(operand_refs, scratch_refs, s, k, j, dtype)` -> `[span, out]`, the weights of span `s`.
        scratch: vector memory that the two share.
        vmem: bytes of vector memory a step needs at most.
        nbytes: of all that is stored.
        name: in profiles.
        turned: `dense` gives `[out, span]`.
    """

    shape: tuple[int, ...]
    operands: Sequence[Operand]
    factors: tuple[int, ...]
    order: tuple[int, ...]
    start: Callable[..., None]
    dense: Callable[..., jax.Array]
    scratch: Sequence[Any]
    vmem: int
    nbytes: int
    name: str
    turned: bool = False


def multiply(x: jax.Array, w: Weights, tile: Tile, *, transpose: bool, interpret: bool) -> jax.Array:
    """`x @ W`, or `x @ W.T`: float32, the reduction in the innermost axis of the grid."""
    (n, out), rows = w.shape, x.shape[0]
    inputs = tile.span * tile.spans
    tiles = pl.cdiv(n, inputs)
    if transpose:
        inner = pad_to(x, tile.rows, tile.out)
        grid = (inner.shape[0] // tile.rows, tiles, inner.shape[1] // tile.out)
        x_spec = pl.BlockSpec((tile.rows, tile.out), lambda i, k, j: (i, j))
        out_spec = pl.BlockSpec((tile.spans, tile.rows, tile.span), lambda i, k, j: (k, i, 0))
        result = jax.ShapeDtypeStruct((tiles * tile.spans, inner.shape[0], tile.span), jnp.float32)
    else:
        inner = to_planes(pad_to(x, tile.rows, inputs), tile.span, w.factors, w.order)
        grid = (inner.shape[1] // tile.rows, pl.cdiv(out, tile.out), tiles)
        x_spec = pl.BlockSpec((tile.spans, tile.rows, tile.span), lambda i, j, k: (k, i, 0))
        out_spec = pl.BlockSpec((tile.rows, tile.out), lambda i, j, k: (i, j))
        result = jax.ShapeDtypeStruct((inner.shape[1], max(out, tile.out)), jnp.float32)
    count = len(w.operands)

    def kernel(x_ref: Any, *refs: Any) -> None:
        stored, out_ref, scratch = refs[:count], refs[count], refs[count + 1 :]
        k, j = (pl.program_id(1), pl.program_id(2)) if transpose else (pl.program_id(2), pl.program_id(1))

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

        w.start(stored, scratch, k, j)

        def step(s: Any, carry: None) -> None:
            dense = w.dense(stored, scratch, s, k, j, x_ref.dtype)
            if transpose:
                out_ref[s] += dot(x_ref[...], dense, 0 if w.turned else 1)
            else:
                out_ref[...] += dot(x_ref[s], dense, 1 if w.turned else 0)
            return carry

        lax.fori_loop(0, tile.spans, step, None, unroll=1 if interpret else unroll(tile))

    y = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[x_spec, *(operand.spec(lambda i, a, b: (a, b) if transpose else (b, a)) for operand in w.operands)],
        out_specs=out_spec,
        out_shape=result,
        scratch_shapes=list(w.scratch),
        compiler_params=compiler_params(w.vmem),
        cost_estimate=cost(rows, w.shape, w.nbytes, inner),
        interpret=simulator(interpret),
        name=f"{w.name}_transposed" if transpose else w.name,
    )(inner, *(operand.array for operand in w.operands))
    return from_planes(y, w.factors, w.order)[:rows, :n] if transpose else y[:rows, :out]


def dot(x: jax.Array, dense: jax.Array, axis: int) -> jax.Array:
    """The last axis of `x` with `axis` of the weights; float32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, dense, dims, precision=precision, preferred_element_type=jnp.float32)


def unroll(tile: Tile) -> int:
    """Spans side by side in the code, so that unpacking one overlaps with the product of another."""
    return max(1, min(tile.spans, 2**18 // (tile.span * tile.out)))


def best_span(n: int, spans: Sequence[int]) -> int:
    """Of the spans that fit, the one with the least work: padding of the inputs, and what each product adds anew.

    In the compiler's schedules for a v5e a product over 128 inputs takes about twice as long an input as one over 1024.
    """
    return min(spans, key=lambda span: (round_up(n, span) * (1 + 128 / span), -span))


def live_weights(tile: Tile) -> int:
    """Weights that are unpacked at a time."""
    return tile.span * tile.out * unroll(tile)


def compiler_params(vmem: int) -> pltpu.CompilerParams:
    """The stated need is the compiler's limit: a kernel that took more would not compile."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem)


def cost(rows: int, shape: tuple[int, ...], nbytes: int, x: jax.Array) -> pl.CostEstimate:
    """For the compiler's scheduler: the packed bytes once, the activations, and the result."""
    n, out = shape
    moved = nbytes + x.size * x.dtype.itemsize + 4 * rows * out
    return pl.CostEstimate(flops=2 * rows * n * out, bytes_accessed=moved, transcendentals=0)


def simulator(interpret: bool) -> Any:
    return pltpu.InterpretParams() if interpret else False
