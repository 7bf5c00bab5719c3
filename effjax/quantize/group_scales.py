"""Scales of groups whose values come from a table: fitted to weights, and once more to the codes of a sweep."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.quantize.kmeans import nearest

FRACTIONS = (1.0, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3)  # of the largest weight, with both signs; ties keep the first
TURNS = 2  # of scales fitted to codes and codes to scales, after the best fraction


def signed_peak(groups: Float[Array, "*groups size out"], dtype: str) -> Float[Array, "*groups 1 out"]:
    """The weight of largest magnitude of every group, with its sign, as it is stored; 1 for a group of zeros.

    Divided by it, every group has its largest weight at 1, so a table may reach further on that side than on the other.

    Example:
        >>> signed_peak(jnp.array([[[1.0], [-4.0]], [[3.0], [-2.0]]]), "float16").ravel().tolist()
        [-4.0, 3.0]
    """
    low, high = groups.min(-2, keepdims=True), groups.max(-2, keepdims=True)
    return _stored(jnp.where(high >= -low, high, low), dtype)


def fit_scales(
    groups: Float[Array, "*groups size out"], table: Float[Array, "entries out"], dtype: str
) -> Float[Array, "*groups 1 out"]:
    """Scales of little squared error: the best of some fractions of the peak, then least squares for its codes.

    Args:
        groups: weights, in groups of `size` inputs.
        table: sorted, one a column; a weight is rounded to the nearest `scale * entry`.
        dtype: dtype that scales are stored in; errors are those of the stored ones. Scales may be negative, never 0.

    Example:
        >>> table = jnp.array([-0.5, 0.0, 1.0])[:, None]
        >>> fit_scales(jnp.array([[-6.0], [3.0], [0.0], [3.0]]), table, "float16").tolist()
        [[-6.0]]
    """
    peak = signed_peak(groups, dtype)

    def better(best: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        error = jnp.square(groups - scale * nearest(groups / scale, table)[1]).sum(-2, keepdims=True)
        improved = error < best[1]
        return jnp.where(improved, scale, best[0]), jnp.where(improved, error, best[1])

    def of_fraction(best: tuple[jax.Array, jax.Array], fraction: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        return better(best, _stored(peak * fraction, dtype)), None

    def of_codes(best: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = best[0]
        values = nearest(groups / scale, table)[1]
        step = _ratio(
            (values * (groups - scale * values)).sum(-2, keepdims=True), jnp.square(values).sum(-2, keepdims=True)
        )
        return better(best, _stored(scale + step, dtype)), None

    fractions = jnp.array([sign * fraction for sign in (1, -1) for fraction in FRACTIONS], jnp.float32)
    best = peak, jnp.full(peak.shape, jnp.inf, jnp.float32)
    best = jax.lax.scan(of_fraction, best, fractions)[0]
    return jax.lax.scan(of_codes, best, length=TURNS)[0][0]


def refit_scales(
    scales: Float[Array, "groups out"],
    values: Float[Array, "n out"],
    w: Float[Array, "n out"],
    hessian: Float[Array, "n n"],
    dtype: str,
    passes: int = 2,
) -> Float[Array, "groups out"]:
    """Moves scales, codes as they are, to where they lose least together: `tr (W - Q)^T H (W - Q)`, column by column.

    One group after the other takes the scale that is best given those of the others, as they are stored, so a later
    group repairs what rounding an earlier one's has cost. A pass is as many multiplications as `H W`. Solving for all
    groups at once takes a linear system of `groups` unknowns for every output, and gained less than 1 % over two passes
    (divergence of the embedded model's predictions at 3 bits).

    Args:
        scales: of each group of `n / groups` inputs.
        values: entries of the table that the codes stand for.
        w: the weight.
        hessian: `H`, second moment of the inputs.
        dtype: dtype that scales are stored in.
        passes: over all groups.

    Example:
        >>> values = jnp.array([1.0, 2.0, -1.0, 1.0])[:, None]
        >>> w = jnp.array([2.0, 4.0, 3.0, -3.0])[:, None]
        >>> refit_scales(jnp.ones((2, 1)), values, w, jnp.eye(4), "float16").tolist()
        [[2.0], [-3.0]]
    """
    count, (n, out) = len(scales), w.shape
    size = n // count
    values, rows = values.reshape(count, size, out), hessian.reshape(count, size, n)

    def of_group(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scales, left = state
        g = i % count
        own, across = values[g], rows[g]
        inside = jax.lax.dynamic_slice_in_dim(across, g * size, size, axis=1)
        slope = (own * jnp.matmul(across, left, precision="highest")).sum(0)
        curvature = (own * jnp.matmul(inside, own, precision="highest")).sum(0)
        new = (scales[g] + _ratio(slope, curvature)).astype(dtype).astype(jnp.float32)
        new = jnp.where(jnp.isfinite(new) & (new != 0), new, scales[g])
        mine = jax.lax.dynamic_slice_in_dim(left, g * size, size) - (new - scales[g]) * own
        return scales.at[g].set(new), jax.lax.dynamic_update_slice_in_dim(left, mine, g * size, axis=0)

    left = w - (values * scales[:, None]).reshape(n, out)
    return jax.lax.fori_loop(0, passes * count, of_group, (scales, left))[0]


def _ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0)


def _stored(scales: jax.Array, dtype: str) -> jax.Array:
    """Scales as they will be read back; never 0, since weights are divided by them."""
    stored = scales.astype(dtype).astype(jnp.float32)
    return jnp.where(stored != 0, stored, 1.0)
