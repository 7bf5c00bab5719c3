"""The sweep of optimal brain quantization: round one input after the other, and let the later ones repair the error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

BLOCK = 128  # inputs between two products with the rest of the matrix, as in GPTQ's released code

Rounder = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


class Swept(NamedTuple):
    """What a sweep leaves.

    Attributes:
        codes: of every weight.
        grids: the grid of every block, stacked, where the sweep made them; else None.
        loss: sum over inputs of `((w - q) / U[j, j])**2` for each output: the error that the sweep could not repair.
        errors: `(w - q) / U[j, j]` of every weight, with `w` as it was when the sweep reached it. The values that the
            sweep left are the original ones less `U^T errors`.
    """

    codes: UInt8[Array, "n out"]
    grids: Any
    loss: Float[Array, " out"]
    errors: Float[Array, "n out"]


def sweep(
    w: Float[Array, "n out"],
    factor: Float[Array, "n n"],
    round_row: Rounder,
    *,
    grid_of_row: Callable[[jax.Array], Any] | None = None,
    grid_of_block: Callable[[jax.Array], Any] | None = None,
    grid_of_run: Callable[[jax.Array, jax.Array], Any] | None = None,
    run: int = 1,
    block: int = BLOCK,
) -> Swept:
    """Rounds the rows of `w` in order; each error is spread over the rows behind it (OBQ; GPTQ, algorithm 1).

    Written left-looking: the current value of a row is the original minus what all errors so far put on it, one product
    with the errors of earlier blocks and one with those of its own. Errors of rows to come are zero, so neither needs a
    mask, every step reads and none rewrites the matrix, and one compiled body serves all blocks and layers.

    Args:
        w: the weight, inputs in sweep order.
        factor: `U` of `inverse_factor`, in the same order.
        round_row: `(row [out], grid) -> (codes uint8[out], values float32[out])`.
        grid_of_row: the grid of row `j`, where grids are known before the sweep.
        grid_of_block: else: the grid of a block, from its current values `[block, out]` (parameters of a group
            "refreshed when the group starts").
        grid_of_run: else: a grid for each of `run` rows that lie in one block, stacked, from their current values
            `[run, out]` and the number of the first.
        run: see there; at most `block`. The last may reach beyond the inputs, onto rows of zeros.
        block: rows a block, made a multiple of `run`; with `grid_of_block` the group size.
    """
    n, out = w.shape
    block = min(block // run, -(-n // run)) * run
    fill = -n % block
    rows = jnp.pad(w.astype(jnp.float32), ((0, fill), (0, 0)))
    factor = jnp.pad(factor, ((0, fill), (0, fill)))
    scale = jnp.where(jnp.arange(n + fill) < n, jnp.diagonal(factor), 1.0)

    def of_block(state: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        errors, loss = state
        across = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        repaired = jax.lax.dynamic_slice_in_dim(rows, start, block) - jnp.matmul(across.T, errors, precision="highest")
        inside = jax.lax.dynamic_slice_in_dim(across, start, block)
        grid = None if grid_of_block is None else grid_of_block(repaired)

        def of_row(j: jax.Array, inner: tuple[jax.Array, jax.Array, jax.Array], known: Any) -> tuple[jax.Array, ...]:
            codes, own, loss = inner
            row = repaired[j] - jnp.matmul(inside[:, j], own, precision="highest")
            code, value = round_row(row, known)
            error = (row - value) / scale[start + j]
            return codes.at[j].set(code), own.at[j].set(error), loss + jnp.square(error)

        def of_run(i: jax.Array, inner: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            if grid_of_run is None:
                return of_row(i, inner, grid if grid_of_row is None else grid_of_row(start + i))
            first = i * run
            across_run = jax.lax.dynamic_slice_in_dim(inside, first, run, axis=1)
            current = jax.lax.dynamic_slice_in_dim(repaired, first, run)
            grids = grid_of_run(current - jnp.matmul(across_run.T, inner[1], precision="highest"), start + first)
            return jax.lax.fori_loop(
                0, run, lambda j, inner: of_row(first + j, inner, jax.tree.map(lambda x: x[j], grids)), inner
            )

        codes = jnp.zeros((block, out), jnp.uint8)
        codes, own, loss = jax.lax.fori_loop(0, block // run, of_run, (codes, jnp.zeros((block, out)), loss))
        return (jax.lax.dynamic_update_slice_in_dim(errors, own, start, axis=0), loss), (codes, grid)

    state = jnp.zeros_like(rows), jnp.zeros(out)
    (errors, loss), (codes, grids) = jax.lax.scan(of_block, state, jnp.arange(0, n + fill, block))
    return Swept(codes=codes.reshape(-1, out)[:n], grids=grids, loss=loss, errors=errors[:n])
