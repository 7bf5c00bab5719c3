"""A query of a Representer Sketch on the CPU: inputs are projected, hashed and looked up in one pass a row."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from kernels_cpu import variants
from kernels_cpu._native import NATIVE

VARIANTS = ("auto", "portable", "avx2", "avx512")
MOST_DIM = 256  # kMostDim in representer.h


def why_not(dim: int, variant: str = "auto") -> str:
    """Why the kernel does not take projections to `dim` channels, in one sentence; empty where it does."""
    if dim > MOST_DIM:
        return f"the native kernel holds {MOST_DIM} projected channels, found {dim}"
    return variants.why_not("representer", variant, VARIANTS)


def group_means(
    x: Float[Array, "batch in"],
    projection: Float[Array, "in dim"],
    directions: Float[Array, "dim hashes rows"],
    offsets: Float[Array, "hashes rows"],
    multiplier: UInt32[Array, "rows hashes 2"],
    addend: UInt32[Array, "rows 2"],
    counts: Float[Array, "rows buckets outputs"],
    *,
    signs: bool,
    groups: int,
    variant: str = "auto",
) -> Float[Array, "batch groups outputs"]:
    """The mean of the cells hit in each of `groups` groups of rows; see `effjax.ops.representer_query`.

    Args:
        signs: codes are signs of products; else the intervals `floor(product + offset)`.
        variant: "auto" takes the fastest that this processor runs.

    Raises:
        ValueError: too many projected channels, or a variant that is unknown or does not run here.

    Example:
        >>> shapes = [(1, 3), (3, 2), (2, 1, 6), (1, 6), (6, 1, 2), (6, 2), (6, 4, 5)]
        >>> arrays = [jnp.ones(shape, jnp.uint32 if i in (4, 5) else jnp.float32) for i, shape in enumerate(shapes)]
        >>> group_means(*arrays, signs=False, groups=2).shape
        (1, 2, 5)
    """
    reason = why_not(projection.shape[1], variant)
    if reason:
        raise ValueError(reason)
    result = jax.ShapeDtypeStruct((x.shape[0], groups, counts.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxRepresenter"), result, vmap_method="sequential")
    floats = (a.astype(jnp.float32) for a in (x, projection, directions, offsets))
    return call(
        *floats,
        multiplier,
        addend,
        counts.astype(jnp.float32),
        signs=np.int64(signs),
        variant=np.int64(variants.VARIANTS[variant]),
    )
