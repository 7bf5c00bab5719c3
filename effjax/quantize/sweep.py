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
    """

    codes: UInt8[Array, "n out"]
    grids: Any
    loss: Float[Array, " out"]


def sweep(
    w: Float[Array, "n out"],
    factor: Float[Array, "n n"],
    round_row: Rounder,
    *,
    grid_of_row: Callable[[jax.Array], Any] | None = None,
    grid_of_block: Callable[[jax.Array], Any] | None = None,
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
        block: rows a block; with `grid_of_block` the group size.
    """
    n, out = w.shape
    block = min(block, n)
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

        def of_row(j: jax.Array, inner: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            codes, own, loss = inner
            row = repaired[j] - jnp.matmul(inside[:, j], own, precision="highest")
            known = grid if grid_of_row is None else grid_of_row(start + j)
            code, value = round_row(row, known)
            error = (row - value) / scale[start + j]
            return codes.at[j].set(code), own.at[j].set(error), loss + jnp.square(error)

        codes = jnp.zeros((block, out), jnp.uint8)
        codes, own, loss = jax.lax.fori_loop(0, block, of_row, (codes, jnp.zeros((block, out)), loss))
        return (jax.lax.dynamic_update_slice_in_dim(errors, own, start, axis=0), loss), (codes, grid)

    state = jnp.zeros_like(rows), jnp.zeros(out)
    (_, loss), (codes, grids) = jax.lax.scan(of_block, state, jnp.arange(0, n + fill, block))
    return Swept(codes=codes.reshape(-1, out)[:n], grids=grids, loss=loss)
