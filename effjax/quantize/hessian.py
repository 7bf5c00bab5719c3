"""The triangular factor of the inverse Hessian that second-order rounding divides by."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def inverse_factor(
    second_moment: Float[Array, "n n"], damping: float, order: jax.Array | None = None
) -> Float[Array, "n n"]:
    """Upper triangular `U` with `(H + damping * mean(diag H) * I)^-1 = U^T U`.

    `U[j, j]**2` is entry `j` of the diagonal of the inverse Hessian of inputs `j` and later (GPTQ, Frantar et al. 2023,
    section 3.3, step 3). The usual route is a Cholesky factorisation, an inverse and a second factorisation. One
    factorisation does: of the reversed matrix, whose lower factor reversed is an upper `R` with `H = R R^T`; then
    `U = R^-1`.

    Inputs that were never active get a Hessian of one: whatever their weights are rounded to costs nothing, and the
    weights are taken as zero (`dead_inputs`). Should the damped matrix still have no factor (fewer rows of data than
    inputs), the damping is multiplied by ten until it has one.

    Args:
        second_moment: `E[x x^T]`, symmetric.
        damping: fraction of the mean of the diagonal that is added to it.
        order: the order in which inputs are swept; `U` is in that order.

    Example:
        >>> h = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> u = inverse_factor(h, damping=0.0)
        >>> bool(jnp.allclose(u.T @ u, jnp.linalg.inv(h), atol=1e-6)), float(u[1, 0])
        (True, 0.0)
    """
    h = second_moment.astype(jnp.float32)
    dead = dead_inputs(h)
    h = jnp.where(dead[:, None] | dead[None, :], 0, h) + jnp.diag(dead.astype(jnp.float32))
    if order is not None:
        h = h[order][:, order]
    mean = jnp.diagonal(h).mean()

    def attempt(damping: jax.Array) -> jax.Array:
        damped = h + damping * mean * jnp.eye(len(h), dtype=h.dtype)
        lower = jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
        identity = jnp.eye(len(h), dtype=h.dtype)
        return jax.lax.linalg.triangular_solve(lower[::-1, ::-1], identity, left_side=True, lower=False)

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.isfinite(state[1]).all() & (state[0] < 1e6)

    def stronger(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(state[0] * 10, 1e-4), attempt(state[0])

    return jax.lax.while_loop(failed, stronger, (jnp.float32(damping), jnp.full_like(h, jnp.nan)))[1]


def dead_inputs(second_moment: Float[Array, "n n"]) -> Bool[Array, " n"]:
    """Inputs that were zero in every row of the calibration data."""
    return jnp.diagonal(second_moment) <= 0


def activation_order(second_moment: Float[Array, "n n"]) -> Array:
    """Inputs by falling diagonal of the Hessian: the most active are rounded first, with all others left to repair."""
    return jnp.argsort(-jnp.diagonal(second_moment), stable=True)
