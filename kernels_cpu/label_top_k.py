"""The best of the labels in a query's hash buckets, on the CPU: code, buckets, logits and ranks in one pass a query."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from kernels_cpu import variants
from kernels_cpu._native import NATIVE

VARIANTS = ("auto", "portable", "avx2", "avx512")
MOST_BITS, MOST_HASHES = 2048, 24  # kMostBits and kMostHashes in label_top_k.h


def why_not(hashes: int, tables: int, variant: str = "auto") -> str:
    """Why the kernel does not take so many hashes and tables, in one sentence; empty where it does."""
    if hashes > MOST_HASHES or hashes * tables > MOST_BITS:
        return (
            f"the native kernel holds {MOST_HASHES} hashes a table and {MOST_BITS} in all, found {hashes} in each of "
            f"{tables}"
        )
    return variants.why_not("label_top_k", variant, VARIANTS)


def label_top_k(
    h: Float[Array, "batch d"],
    directions: Float[Array, "d1 hashes tables"],
    ids: Int32[Array, "tables labels"],
    offsets: Int32[Array, "tables edges"],
    weights: Float[Array, "labels d"],
    bias: Float[Array, "labels"],
    fallback: Int32[Array, "few"],
    *,
    k: int,
    variant: str = "auto",
) -> tuple[Float[Array, "batch k"], Int32[Array, "batch k"], Int32[Array, "batch"]]:
    """Logits and labels of the `k` best, and how many were scored; see `effjax.ops.label_top_k`.

    Args:
        weights: float32 or bfloat16.
        variant: "auto" takes the fastest that this processor runs.

    Raises:
        ValueError: too many hashes, or a variant that is unknown or does not run here.

    Example:
        >>> shapes = [(1, 3), (4, 2, 5), (5, 7), (5, 5), (7, 3), (7,), (1,)]
        >>> arrays = [jnp.zeros(shape, jnp.int32 if i in (2, 3, 6) else jnp.float32) for i, shape in enumerate(shapes)]
        >>> [x.tolist() for x in label_top_k(*arrays, k=1)]  # all buckets empty: label 0, the fallback
        [[[0.0]], [[0]], [1]]
    """
    _, hashes, tables = directions.shape
    reason = why_not(hashes, tables, variant)
    if reason:
        raise ValueError(reason)
    batch = h.shape[0]
    results = (
        jax.ShapeDtypeStruct((batch, k), jnp.float32),
        jax.ShapeDtypeStruct((batch, k), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxLabelTopK"), results, vmap_method="sequential")
    number = np.int64(variants.VARIANTS[variant])
    values, labels, scored = call(h, directions, ids, offsets, weights, bias, fallback, variant=number)
    return values, labels, scored
