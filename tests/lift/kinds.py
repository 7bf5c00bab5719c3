"""Every array type, made from a dense weight, and the comparison of a lifted function with its materialised weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import effjax as ej
from effjax.arrays import NMSparse, Sum, fold, unfold
from effjax.paths import map_with_paths, matches
from effjax.rules import default_axes, is_dense_matrix


def _nm_sparse(w):
    order = jnp.argsort(jnp.abs(w).reshape(*w.shape[:-2], -1, 4, w.shape[-1]), axis=-2)
    rank = jnp.argsort(order, axis=-2)
    return NMSparse.from_dense(w, (rank >= 2).reshape(w.shape), n=2, m=4)


def _low_rank(w, rank=3):
    return ej.sketch.LowRank(rank=rank).compress(w)


KINDS = {
    "quantized": lambda w: ej.quantize.RTN(bits=4, group_size=8).quantize(w),
    "nf4": lambda w: ej.quantize.NF4(block_size=8).quantize(w),
    "nm_sparse": _nm_sparse,
    "low_rank": _low_rank,
    "hashed": lambda w: ej.sketch.Hashed(ratio=4).compress(w, key=jax.random.key(7)),
    "sum": lambda w: Sum(
        parts=(ej.quantize.RTN(bits=4, group_size=8, symmetric=True).quantize(w), _low_rank(w, rank=2))
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def _compressed(kind, w):
    return KINDS[kind](w)


def compress(params, kind="quantized", where=is_dense_matrix):
    """`params` with the leaves that `where` selects in the array type `kind`."""

    def leaf(path, w):
        if not matches(where, path, w):
            return w
        in_axes, out_axes = default_axes(path, w.ndim)
        return unfold(_compressed(kind, fold(w, in_axes, out_axes)), w.shape, in_axes, out_axes)

    return map_with_paths(leaf, params)


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest value of each leaf, or to the last places of its dtype."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        if jnp.issubdtype(e.dtype, jnp.floating):
            allowed = max(tolerance, 2 * float(jnp.finfo(e.dtype).eps))
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            np.testing.assert_array_equal(np.isnan(a), np.isnan(e))
            scale = max(1e-6, float(np.nanmax(np.abs(e), initial=0)))
            np.testing.assert_allclose(a / scale, e / scale, atol=allowed, rtol=0)
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def strict(fn):
    """`lift` that refuses to make any weight dense."""
    return ej.lift(fn, on_materialize="error", limit=0)


def assert_lifts(fn, params, *args, tolerance=1e-5, ops=None):
    """`fn` on compressed parameters equals `fn` on their dense copies, and every weight stays compressed.

    Args:
        ops: where given, the (path, operation) pairs in which weights must have been met.
    """
    assert any(map(ej.is_compressed, jax.tree.leaves(params, is_leaf=ej.is_compressed)))

    def both(params, *args):
        return strict(fn)(params, *args), fn(ej.materialize(params), *args)

    actual, expected = jax.jit(both)(params, *args)
    assert_close(actual, expected, tolerance)
    coverage = strict(fn).coverage(params, *args)
    assert not coverage.materialized
    if ops is not None:
        assert {(use.path, use.op) for use in coverage.uses} == set(ops)
    return actual
