"""The product of the Hopper kernels: packed weights dequantised in registers, the left operand of the tensor cores.

The product is computed as its transpose, `y.T = W.T @ x.T`. The left operand of `wgmma` may come from registers, so a
tile of `W.T` goes from packed bytes in shared memory to bf16 in registers to the tensor core and is never written back;
and the tensor core's 64 rows are filled with outputs of the matrix, so that the rows of `x` are padded to 8, not to 64.

One kernel serves decode and prefill: `Tile.rows` and `Tile.splits` are what differs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.gpu_packed import BLOCK, Packed, exact_terms, pad_to, round_up, two_parts
from kernels_pallas.gpu_tile import Tile, choose_tile, contraction_pairs


def matmul(
    x: Float[Array, "rows n"], packed: Packed, *, transpose: bool, tile: Tile | None, interpret: Any
) -> Float[Array, "rows m"]:
    """`x` times the matrix, or its transpose, both padded with zeros, in float32."""
    rows = x.shape[0]
    terms = exact_terms(pad_to(x, rows, 2 * packed.pairs if transpose else packed.run * packed.runs))
    tile = tile or choose_tile(rows * len(terms), packed, transpose=transpose)
    stacked = jnp.concatenate(terms) if len(terms) > 1 else terms[0]
    stacked = pad_to(stacked, round_up(stacked.shape[0], tile.rows), stacked.shape[1])
    steps = packed.pairs // BLOCK if transpose else packed.runs // packed.step
    if steps % tile.splits:
        raise ValueError(f"splits={tile.splits} do not divide the {steps} steps of this contraction")
    if not transpose and packed.pairs % (tile.columns // 2):
        raise ValueError(f"columns={tile.columns} do not divide {2 * packed.pairs} outputs")
    # Within a step, code j of all runs (or the even and the odd outputs) lie together.
    parts, size = (2, BLOCK) if transpose else (packed.run, packed.step)
    arranged = stacked.reshape(-1, steps, size, parts).swapaxes(2, 3).reshape(stacked.shape)
    call = _transposed if transpose else _forward
    # What a block writes lies together: [splits, parts, row tiles, size, tile rows].
    partial = call(arranged, packed, tile, interpret or None)
    product = partial.sum(0).transpose(1, 3, 2, 0).reshape(stacked.shape[0], -1)[: rows * len(terms)]
    return product.reshape(len(terms), rows, -1).sum(0)


def _forward(x: jax.Array, packed: Packed, tile: Tile, interpret: Any) -> jax.Array:
    """`[splits, 2, row tiles, pairs, tile rows]`: partial sums of the even and the odd outputs."""
    size, run, m = packed.step, packed.run, tile.rows
    width = tile.columns // 2
    steps = packed.runs // size // tile.splits
    across = packed.pairs // width
    blocks = range(width // BLOCK)
    per_group = max(packed.group // size, 1)
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    def spread(row: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return lax.broadcast_in_dim(row, shape, (0,))

    def kernel(x_gmem: Any, *refs: Any) -> None:
        planes_gmem, sides_gmem, constants_gmem, out_gmem = _split(refs, packed)
        column, split, row = lax.axis_index("columns"), lax.axis_index("splits"), lax.axis_index("rows")
        first = split * steps

        def multiply(
            b: int, x_smem: Any, planes_smem: Any, sides: list[jax.Array], tables: Any, accumulators: Any
        ) -> None:
            words = []
            for ref in planes_smem:
                # The load that follows the bytes has outputs in pairs down a column; a shuffle turns it.
                word = ref.transpose((1, 0))[pl.ds(BLOCK * b, BLOCK), :]
                words.append(
                    plgpu.layout_cast(plgpu.layout_cast(word, plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)
                )
            shape = (BLOCK, size)
            constants = [_entries(table, b) for table in tables]
            for j in range(run):
                right = x_smem.at[:, pl.ds(j * size, size)].transpose((1, 0))
                for parity, accumulator in accumulators:
                    repeat = functools.partial(spread, shape=shape)
                    for part in packed.values(j, parity, words, sides, constants, repeat):
                        plgpu.wgmma(accumulator, part, right)

        def side_rows(sides_smem: Any, b: int) -> list[jax.Array]:
            return [plgpu.layout_cast(ref[0, pl.ds(BLOCK * b, BLOCK)], row_layout) for ref in sides_smem]

        def grouped(tables: Any, _: Any, x_smem: Any, *rest: Any) -> tuple[jax.Array, ...]:
            *smem, totals = rest
            planes_smem, sides_smem = smem[: len(packed.planes)], smem[len(packed.planes) :]
            new = []
            for b in blocks:
                sides = side_rows(sides_smem, b)

                def both(even: Any, odd: Any, b: int = b, sides: Any = sides) -> tuple[jax.Array, jax.Array]:
                    multiply(b, x_smem, planes_smem, sides, tables, ((0, even), (1, odd)))
                    return even[...], odd[...]

                products = pl.run_scoped(both, _accumulator(m), _accumulator(m))
                for parity, product in enumerate(products):
                    assert packed.scale is not None
                    scale = spread(packed.scale(parity, sides), (BLOCK, m))
                    new.append(totals[2 * b + parity] + product * scale)
            return tuple(new)

        specs = [
            plgpu.BlockSpec(
                (m, run * size),
                lambda k: (row, first + k),
                transforms=(plgpu.TilingTransform((8, size)), plgpu.SwizzleTransform(2 * size)),
            ),
            *(
                plgpu.BlockSpec(
                    (size, width),
                    lambda k, plane=plane: (first + k, plane * across + column),
                    transforms=_swizzled(array.dtype),
                )
                for array, plane in packed.planes
            ),
            *(
                plgpu.BlockSpec((1, width), lambda k: (lax.div(first + k, jnp.int32(per_group)), column))
                for _ in packed.sides
            ),
        ]
        inputs = (x_gmem, *planes_gmem, *sides_gmem)

        def store(values: Any) -> None:
            for i, value in enumerate(values):
                where = pl.ds(column * width + BLOCK * (i // 2), BLOCK)
                out_gmem[split, i % 2, row, where, :] = value

        def with_groups(tables: Any) -> Any:
            zero = plgpu.layout_cast(jnp.zeros((BLOCK, m), jnp.float32), plgpu.Layout.WGMMA)
            return plgpu.emit_pipeline(
                functools.partial(grouped, tables),
                grid=(steps,),
                in_specs=specs,
                max_concurrent_steps=tile.stages,
                init_carry=(zero,) * (2 * len(blocks)),
            )(*inputs)

        def in_one(tables: Any) -> Any:
            def whole(*accumulators: Any) -> tuple[jax.Array, ...]:
                def body(_: Any, x_smem: Any, *smem: Any) -> None:
                    planes_smem, sides_smem = smem[: len(packed.planes)], smem[len(packed.planes) :]
                    for b in blocks:
                        pair = tuple(enumerate(accumulators[2 * b : 2 * b + 2]))
                        multiply(b, x_smem, planes_smem, side_rows(sides_smem, b), tables, pair)
                    plgpu.wgmma_wait(0)

                plgpu.emit_pipeline(body, grid=(steps,), in_specs=specs, max_concurrent_steps=tile.stages)(*inputs)
                return tuple(ref[...] for ref in accumulators)

            return pl.run_scoped(whole, *(_accumulator(m) for _ in range(2 * len(blocks))))

        product = in_one if packed.scale is None else with_groups
        for i, value in enumerate(_with_tables(product, constants_gmem, column, width)):
            where = pl.ds(column * width + BLOCK * (i // 2), BLOCK)
            out_gmem[split, i % 2, row, where, :] = value

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tile.splits, 2, x.shape[0] // m, packed.pairs, m), jnp.float32),
        grid=(across, tile.splits, x.shape[0] // m),
        grid_names=("columns", "splits", "rows"),
        interpret=interpret,
    )(x, *_arrays(packed))


def _transposed(x: jax.Array, packed: Packed, tile: Tile, interpret: Any) -> jax.Array:
    """`[splits, run, row tiles, runs, tile rows]`: partial sums of input `j` of every run."""
    run, m = packed.run, tile.rows
    steps = packed.pairs // BLOCK // tile.splits
    across = packed.pairs // BLOCK
    per_group = max(packed.group // BLOCK, 1)
    column_layout = plgpu.Layout.WGMMA.reduce(0)
    depth = contraction_pairs(packed)
    shape = (BLOCK, depth)

    def spread(column: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(column, shape, (1,))

    def kernel(x_gmem: Any, *refs: Any) -> None:
        planes_gmem, sides_gmem, constants_gmem, out_gmem = _split(refs, packed)
        block, split, row = lax.axis_index("runs"), lax.axis_index("splits"), lax.axis_index("rows")
        first = split * steps
        group = lax.div(block, jnp.int32(per_group))
        constants = [_scalars(ref) for ref in constants_gmem]

        def body_of(accumulators: Any) -> Callable[..., None]:
            def body(_: Any, x_smem: Any, *smem: Any) -> None:
                planes_smem, sides_smem = smem[: len(packed.planes)], smem[len(packed.planes) :]
                for start in range(0, BLOCK, depth):
                    words = [_columns(ref, start, depth) for ref in planes_smem]
                    cut = pl.ds(start, depth)
                    sides = [plgpu.layout_cast(ref[0, cut], column_layout) for ref in sides_smem]
                    for parity in range(2):
                        right = x_smem.at[:, pl.ds(parity * BLOCK + start, depth)].transpose((1, 0))
                        scale = None if packed.scale is None else spread(packed.scale(parity, sides))
                        for j, accumulator in enumerate(accumulators):
                            parts = packed.values(j, parity, words, sides, constants, spread)
                            if scale is not None:
                                exact = functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])
                                parts = two_parts(exact * scale, packed.parts)
                            for part in parts:
                                plgpu.wgmma(accumulator, part, right)
                    plgpu.wgmma_wait(0)

            return body

        specs = [
            plgpu.BlockSpec(
                (m, 2 * BLOCK),
                lambda k: (row, first + k),
                transforms=(plgpu.TilingTransform((8, depth)), plgpu.SwizzleTransform(2 * depth)),
            ),
            *(
                plgpu.BlockSpec(
                    (BLOCK, BLOCK),
                    lambda k, plane=plane: (block, plane * across + first + k),
                    transforms=_swizzled(array.dtype),
                )
                for array, plane in packed.planes
            ),
            *(plgpu.BlockSpec((1, BLOCK), lambda k: (group, first + k)) for _ in packed.sides),
        ]

        def whole(*accumulators: Any) -> tuple[jax.Array, ...]:
            plgpu.emit_pipeline(body_of(accumulators), grid=(steps,), in_specs=specs, max_concurrent_steps=tile.stages)(
                x_gmem, *planes_gmem, *sides_gmem
            )
            return tuple(ref[...] for ref in accumulators)

        for j, value in enumerate(pl.run_scoped(whole, *(_accumulator(m) for _ in range(run)))):
            out_gmem[split, j, row, pl.ds(block * BLOCK, BLOCK), :] = value

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tile.splits, run, x.shape[0] // m, packed.runs, m), jnp.float32),
        grid=(packed.runs // BLOCK, tile.splits, x.shape[0] // m),
        grid_names=("runs", "splits", "rows"),
        interpret=interpret,
    )(x, *_arrays(packed))


def _columns(ref: Any, start: int, depth: int) -> jax.Array:
    """`depth` columns of a tile in registers; a tile of 128 bytes a row can only be cut between whole rows of it."""
    if depth % (128 // ref.dtype.itemsize) == 0:
        return plgpu.layout_cast(ref[:, pl.ds(start, depth)], plgpu.Layout.WGMMA)
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)[:, start : start + depth]


def _accumulator(m: int) -> Any:
    return plgpu.ACC((BLOCK, m), jnp.float32)


def _swizzled(dtype: Any) -> tuple[Any, Any]:
    """Rows of 128 bytes whose 16-byte pieces are permuted, so that a column of them meets every bank once."""
    return plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128)


def _with_tables(product: Callable[[Any], Any], constants_gmem: Any, column: Any, width: int) -> Any:
    """Calls `product` with the tables: scalars in registers, those of the columns of a block in shared memory."""
    scalars = [_scalars(source) if len(source.shape) == 1 else None for source in constants_gmem]
    sources = [source for source in constants_gmem if len(source.shape) > 1]
    if not sources:
        return product(scalars)

    def copied(*scratch: Any) -> Any:
        *tables, barrier = scratch
        for source, table in zip(sources, tables, strict=True):
            plgpu.copy_gmem_to_smem(source.at[:, pl.ds(column * width, width)], table, barrier)
            plgpu.barrier_wait(barrier)
        rest = iter(tables)
        return product([next(rest) if known is None else known for known in scalars])

    shapes = [plgpu.SMEM((source.shape[0], width), source.dtype) for source in sources]
    return pl.run_scoped(copied, *shapes, plgpu.Barrier())


def _scalars(ref: Any) -> list[jax.Array]:
    return [ref[i] for i in range(ref.shape[0])]


def _entries(table: Any, b: int) -> list[jax.Array]:
    """All entries of a table: scalars, or a value for each of the 64 pairs of block `b`."""
    if isinstance(table, list):
        return table
    # Read where they are used: kept over the loop they would take more registers than there are.
    layout = plgpu.Layout.WGMMA.reduce(1)
    return [plgpu.layout_cast(table[i, pl.ds(BLOCK * b, BLOCK)], layout) for i in range(table.shape[0])]


def _arrays(packed: Packed) -> tuple[jax.Array, ...]:
    return (*(array for array, _ in packed.planes), *packed.sides, *packed.constants)


def _split(refs: Any, packed: Packed) -> tuple[Any, Any, Any, Any]:
    """The arguments of a kernel as planes, sides, constants and output."""
    a = len(packed.planes)
    b = a + len(packed.sides)
    return refs[:a], refs[a:b], refs[b:-1], refs[-1]
