"""`sketch_params`: weights of a parameter tree to fewer trainable values."""

from typing import Any

import jax

from effjax.arrays.base import PyTree
from effjax.errors import ConfigError
from effjax.paths import Where
from effjax.sketch.sharing import Sharing
from effjax.transform import compress_leaves, select


def sketch_params(
    params: PyTree,
    method: Any,
    *,
    stats: PyTree | None = None,
    key: jax.Array | None = None,
    where: Where | None = None,
) -> PyTree:
    """Replaces the matrices of a parameter tree by sketches whose values can be trained.

    Arguments, rules and errors are those of `effjax.quantize_params`; `effjax.partition` then separates the trainable
    (floating) leaves from the frozen (integer) ones.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((64, 64))}
        >>> sketched = ej.sketch_params(params, ej.sketch.Hashed(ratio=8), key=jax.random.key(0))
        >>> sketched["kernel"].table.shape
        (512,)
    """
    for m in [m for _, m in method] if isinstance(method, list | tuple) else [method]:
        if isinstance(m, Sharing):
            raise ConfigError(f"{m!r} shares one table among all leaves: use effjax.sketch.share_params")
    return compress_leaves(select(params, method, where=where, stats=stats, key=key), params)
