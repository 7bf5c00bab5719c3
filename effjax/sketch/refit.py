"""Table values that lose least on the calibrated inputs, for codes that are fixed already."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from effjax.arrays.codebook import look_up


def refit_tables(
    w: Float[Array, "in out"],
    codes: Integer[Array, "in out"],
    tables: Float[Array, "groups out entries"],
    moment: Float[Array, "in in"],
    steps: int,
) -> Float[Array, "groups out entries"]:
    """Least squares for the table entries: the codebook update of GPTVQ (van Baalen et al. 2024, section 3.2).

    For each output minimises `(w - q)^T H (w - q)` over the entries that `q` reads, by conjugate gradients on all
    outputs at once, preconditioned with the diagonal. A step is one product with `H`, whatever the size of the tables;
    none makes any output worse. An entry that nothing reads stays.

    Args:
        w: the weight.
        codes: the entry that each weight reads.
        tables: where to start.
        moment: `H`, positive definite.
        steps: of conjugate gradients; 0 returns `tables`.

    Example:
        >>> w, codes = jnp.array([[1.0], [2.0], [6.0]]), jnp.array([[0], [0], [1]])
        >>> refit_tables(w, codes, jnp.zeros((1, 1, 2)), jnp.eye(3), 2).ravel().tolist()
        [1.5, 6.0]
    """

    def read(tables: jax.Array) -> jax.Array:
        return look_up(codes, tables, None, jnp.dtype("float32"))

    _, back = jax.vjp(read, tables)

    def gathered(rest: jax.Array) -> jax.Array:
        return back(rest)[0]

    def weighed(values: jax.Array) -> jax.Array:
        return jnp.matmul(moment, values, precision="highest")

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a * b).sum((0, 2))[:, None]

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    scale = gathered(jnp.broadcast_to(jnp.diagonal(moment)[:, None], w.shape))

    def step(state: Any, _: None) -> tuple[Any, None]:
        tables, rest, way, size = state
        bent = gathered(weighed(read(way)))
        length = ratio(size, dot(way, bent))
        tables, rest = tables + length * way, rest - length * bent
        nearer = ratio(rest, scale)
        new = dot(rest, nearer)
        return (tables, rest, nearer + ratio(new, size) * way, new), None

    rest = gathered(weighed(w - read(tables)))
    way = ratio(rest, scale)
    return jax.lax.scan(step, (tables, rest, way, dot(rest, way)), length=steps)[0][0]
