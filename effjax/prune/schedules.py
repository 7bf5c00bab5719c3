"""How much is pruned when, and where: gradual schedules, and the densities of layers of different shapes."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.errors import ConfigError


def cubic_sparsity(step: Any, begin: int, end: int, final: float, initial: float = 0.0) -> Any:
    """Fast at first, slowly at last: `final + (initial - final) * (1 - t)**3` (Zhu and Gupta, To Prune or Not to Prune,
    2017, equation 1). `step` may be traced.

    Example:
        >>> [round(float(cubic_sparsity(step, begin=0, end=100, final=0.8)), 3) for step in (-5, 0, 50, 100, 200)]
        [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    t = jnp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
    return final + (initial - final) * (1 - t) ** 3


def geometric_sparsity(done: int, rounds: int, final: float) -> float:
    """Each round leaves an equal share of what the one before left: lottery tickets and SynFlow.

    A round of a lottery ticket trains, masks by `ej.prune.Magnitude(sparsity=geometric_sparsity(...))`, and goes back
    to the weights of an early step: `ej.apply_mask(early, mask)` (Frankle and Carbin 2019; Frankle et al. 2020).

    Example:
        >>> [round(geometric_sparsity(done, 2, 0.75), 3) for done in (0, 1, 2)]
        [0.0, 0.5, 0.75]
    """
    return 1 - (1 - final) ** (done / rounds)


def erk_sparsities(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: a layer's density is proportional to the sum of its axes over their product.

    So each unit keeps a similar number of connections; layers that would need more weights than they have stay dense
    (Evci et al., RigL, ICML 2020, section 3).

    Args:
        shapes: of each weight, by path.
        sparsity: of all together.

    Raises:
        ConfigError: no shape, or no share.

    Example:
        >>> found = erk_sparsities({"wide": (100, 100), "thin": (100, 10)}, 0.9)
        >>> {path: round(share, 3) for path, share in found.items()}
        {'wide': 0.929, 'thin': 0.61}
    """
    if not shapes or not 0 <= sparsity < 1:
        raise ConfigError(f"{len(shapes)} shapes, sparsity={sparsity}: at least one shape and a share in [0, 1)")
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    raw = {path: sum(shape) / sizes[path] for path, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(sizes.values()) - sum(sizes[path] for path in dense)
        rest = [path for path in sizes if path not in dense]
        scale = budget / sum(raw[path] * sizes[path] for path in rest) if rest else 0.0
        above = {path for path in rest if scale * raw[path] > 1}
        if not above:
            return {path: 0.0 if path in dense else float(np.clip(1 - scale * raw[path], 0, 1)) for path in sizes}
        dense |= above
