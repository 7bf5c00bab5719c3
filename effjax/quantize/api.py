"""`quantize_params`: weights of a parameter tree to fewer bits."""

from typing import Any

import jax

from effjax.arrays.base import PyTree
from effjax.paths import Where
from effjax.transform import compress_leaves, select


def quantize_params(
    params: PyTree,
    method: Any,
    *,
    stats: PyTree | None = None,
    key: jax.Array | None = None,
    where: Where | None = None,
) -> PyTree:
    """Quantizes the matrices of a parameter tree.

    Pure: the same inputs give the same bytes. Works on `ShapeDtypeStruct`s through `jax.eval_shape`, under `jit` and
    `vmap`, and on sharded arrays.

    Args:
        params: pytree of weights `[*L, in, out]` (Linen, NNX state, plain dicts).
        method: a method of `effjax.quantize`, or a list of `(where, method | None)` rules, the first match of which
            decides.
        stats: statistics from `effjax.calibrate`, for methods that need them.
        key: random key, for methods that draw.
        where: pattern or predicate for a single method; the matrices of dense layers by default.

    Returns:
        The same tree with compressed leaves.

    Raises:
        RuleError: a rule matches nothing.
        LeafError: a leaf does not fit its method, with its path and shape.
        CalibrationError: statistics are missing.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"mlp": {"kernel": jnp.ones((64, 16)), "bias": jnp.zeros(16)}}
        >>> qparams = ej.quantize_params(params, ej.quantize.RTN(bits=4, group_size=32))
        >>> type(qparams["mlp"]["kernel"]).__name__, ej.nbytes(qparams["mlp"]["kernel"])
        ('Quantized', 592)
    """
    return compress_leaves(select(params, method, where=where, stats=stats, key=key), params)
