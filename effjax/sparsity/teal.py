"""TEAL: inputs of a product that are small are dropped, below a threshold found on recorded activations.

Liu et al., "Training-Free Activation Sparsity in Large Language Models", ICLR 2025. Nothing is trained.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float


def teal_threshold(x: Float[Array, "..."], sparsity: float) -> Float[Array, ""]:
    """The size below which the wanted share of recorded activations lies.

    Example:
        >>> float(teal_threshold(jnp.array([1.0, -2.0, 3.0, -4.0]), 0.5))
        2.5
    """
    return jnp.quantile(jnp.abs(x), sparsity)


def teal_sparsify(x: Float[Array, "*batch in"], threshold: float | Float[Array, ""]) -> Float[Array, "*batch in"]:
    """Activations of at most that size become zero.

    Example:
        >>> teal_sparsify(jnp.array([1.0, -2.0, 3.0]), 2.0).tolist()
        [0.0, 0.0, 3.0]
    """
    return jnp.where(jnp.abs(x) > threshold, x, 0)


def allocate_sparsity(
    error: Callable[[Mapping[str, float]], float], weights: Mapping[str, int], target: float, *, step: float = 0.05
) -> dict[str, float]:
    """Shares of a block's sparsity among its matrices, by the greedy algorithm of the paper.

    Args:
        error: of the block's output for the sparsities of its matrices by name.
        weights: number of weights of each matrix: a sparsity saves that share of them.
        target: mean sparsity, weighed by them, in [0, 1).
        step: gain in the mean that each step makes; the matrix that pays for it with the least error gives it.

    Returns:
        Sparsities by name, in [0, 1], whose weighed mean is at least the target and less than a step beyond it.

    Raises:
        ValueError: a target or a step out of range.

    Example:
        >>> allocate_sparsity(lambda s: 2 * s["q"] ** 2 + s["up"] ** 2, {"q": 100, "up": 100}, 0.5, step=0.25)
        {'q': 0.5, 'up': 0.5}
    """
    if not 0 <= target < 1 or not 0 < step < 1:
        raise ValueError(f"allocate_sparsity: target={target} must lie in [0, 1) and step={step} in (0, 1)")
    total = sum(weights.values())
    found = dict.fromkeys(weights, 0.0)

    def raised(name: str) -> dict[str, float]:
        return {**found, name: min(1.0, found[name] + step * total / weights[name])}

    while sum(found[name] * weights[name] for name in weights) < (target - 1e-9) * total:
        open_ones = [name for name in weights if found[name] < 1.0]
        found = raised(min(open_ones, key=lambda name: error(raised(name))))
    return found
