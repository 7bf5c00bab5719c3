"""How much every layer changes its input: layers that change it least can go as a whole."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import PyTree
from effjax.errors import CalibrationError

if TYPE_CHECKING:  # whose recipes import this package
    from effjax.sequential import Stage


def block_influence(stages: "Sequence[Stage]", params: PyTree, batches: Iterable[PyTree]) -> np.ndarray:
    """`1 - mean cosine(input, output)` of every stage after the first, `float64[stages - 1]`.

    Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (2024), equation 1; the
    cosine is that of the last axis, the mean over all positions of all batches.

    Args:
        stages: parts whose outputs have the shape of their inputs, after a first one that makes the input, as
            `effjax.models.decoder.stages(config)` gives for a decoder.
        params: of the whole model, dense.
        batches: inputs of the first stage.

    Raises:
        CalibrationError: no batches, or a stage that changes the shape.

    Example:
        >>> import effjax as ej
        >>> from effjax.models.decoder import stages
        >>> from effjax.models.embedded import load_default
        >>> model = load_default()
        >>> tokens = jnp.asarray([model.encode("def read(path):")])
        >>> influence = ej.prune.block_influence(stages(model.config), model.params, [tokens])
        >>> influence.shape, bool((influence > 0).all())
        ((4,), True)
    """
    first, *rest = stages
    total, count = np.zeros(len(rest)), 0
    for batch in batches:
        x = first.apply(params[first.name], batch)
        for number, stage in enumerate(rest):
            y, cosines = _run(stage.apply, params[stage.name], x)
            if y.shape != x.shape:
                raise CalibrationError(f"{stage.name} makes {list(y.shape)} of {list(x.shape)}: it cannot be left out")
            total[number] += float(cosines)
            x = y
        count += int(np.prod(x.shape[:-1]))
    if not count:
        raise CalibrationError("block_influence: the calibration set is empty: at least one batch is needed")
    return 1 - total / count


@partial(jax.jit, static_argnums=0)
def _run(apply, params: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = apply(params, x)
    if y.shape != x.shape:
        return y, jnp.zeros(())
    a, b = (v.astype(jnp.float32) for v in (x, y))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return y, jnp.sum(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30))
