"""Stacked matrices one after the other: the bytes of a matrix do not depend on what it is stacked with."""

from collections.abc import Callable
from typing import Any

import jax


def one_by_one(fn: Callable[..., Any], w: jax.Array, *args: Any) -> Any:
    """`fn(matrix, *slices)` for every matrix of `w [*L, in, out]`, in one loop; also where `vmap` adds more axes.

    Batched products and solvers may add up in another order than single ones do. A loop compiles the single one, so a
    layer compresses to the same bytes alone, stacked, or as one of many experts, and takes the memory of one.

    Args:
        fn: from a matrix `[in, out]` and slices of `args` to any pytree of arrays.
        w: `[*L, in, out]`.
        args: pytrees whose arrays lead with `*L`.
    """
    looped = jax.custom_batching.sequential_vmap(fn)
    for _ in w.shape[:-2]:
        looped = jax.vmap(looped)
    return looped(w, *args)
