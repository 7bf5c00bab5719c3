"""Neurons that successive tokens share: how many a text uses in all, and what reusing a set of them saves.

Source: Mirzadeh et al., ReLU Strikes Back (ICLR 2024), section 5.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import ConfigError

Masks = Bool[Array, "*batch length neurons"]


def used_fraction(active: Masks) -> Float[Array, "*batch length"]:
    """Share of the neurons that any of the first `t` tokens used, for `t` from 1.

    Example:
        >>> used_fraction(jnp.array([[True, False, False, False], [False, True, False, False]])).tolist()
        [0.25, 0.5]
    """
    return jnp.mean(jax.lax.cummax(jnp.asarray(active, jnp.int8), axis=active.ndim - 2), axis=-1, dtype=jnp.float32)


def unused_fraction(active: Masks) -> Float[Array, "*batch length"]:
    """Aggregated sparsity: share of the neurons that none of the first `t` tokens used (section 5.1)."""
    return 1 - used_fraction(active)


def independent_unused(rates: Float[Array, " neurons"], tokens: int) -> Float[Array, " tokens"]:
    """What `unused_fraction` would be if tokens chose neurons independently, each neuron at its own rate.

    Example:
        >>> independent_unused(jnp.array([0.5, 0.0]), 2).tolist()
        [0.75, 0.625]
    """
    t = jnp.arange(1, tokens + 1)[:, None]
    return jnp.mean((1 - jnp.asarray(rates, jnp.float32)) ** t, axis=-1)


def reuse_mask(active: Masks, gamma: int) -> Masks:
    """Neurons that each token may use when every second block of `gamma` tokens loads none.

    Blocks alternate: in the first, third, … every neuron may be used; in the second, fourth, … those alone that the
    block before used (section 5.1).

    Args:
        active: neurons that are not 0, in the run whose blocks are cut.
        gamma: tokens of a block.

    Raises:
        ConfigError: `gamma` is below 1.

    Example:
        >>> reuse_mask(jnp.array([[True, False], [False, True]]), 1).tolist()
        [[True, True], [True, False]]
    """
    if gamma < 1:
        raise ConfigError(f"gamma={gamma}: must be at least 1")
    *batch, length, neurons = active.shape
    blocks = -(-length // gamma)
    padding = [(0, 0)] * len(batch) + [(0, blocks * gamma - length), (0, 0)]
    used = jnp.pad(active, padding).reshape(*batch, blocks, gamma, neurons).any(-2)
    before = jnp.roll(used, 1, axis=-2)
    loads = jnp.arange(blocks)[:, None] % 2 == 0
    return jnp.repeat(before | loads, gamma, axis=-2)[..., :length, :]


def shuffled_neurons(key: Array, mask: Masks) -> Masks:
    """The control of a reuse mask: in every block of equal tokens a random set of as many neurons.

    Tokens that may use the same neurons in succession share one random set.

    Example:
        >>> mask = jnp.array([[True, True], [True, False], [True, False]])
        >>> shuffled_neurons(jax.random.key(0), mask).sum(-1).tolist()
        [2, 1, 1]
    """
    *batch, length, neurons = mask.shape
    changes = jnp.any(mask[..., 1:, :] != mask[..., :-1, :], axis=-1)
    block = jnp.cumsum(jnp.pad(changes, [(0, 0)] * len(batch) + [(1, 0)]), axis=-1)
    ranks = jnp.argsort(jax.random.uniform(key, (*batch, length, neurons)), axis=-1)
    ranks = jnp.take_along_axis(ranks, block[..., None], axis=-2)
    return ranks < mask.sum(-1, keepdims=True)


def speculative_speedup(cost: float, gamma: int, unused: float, acceptance: float | None = None) -> float:
    """How much sparse verification speeds up speculative decoding (section 5.2 and its appendix).

    Args:
        cost: time of a draft token over that of a target's.
        gamma: draft tokens that are verified at once.
        unused: aggregated sparsity over them: the share of the work that their union leaves out.
        acceptance: rate at which a draft token is accepted; with it the result is over decoding one by one.

    Example:
        >>> round(speculative_speedup(cost=0.05, gamma=16, unused=0.38), 2)
        1.27
    """
    over_speculative = (cost * gamma + 1) / (cost * gamma + 1 - unused)
    if acceptance is None:
        return over_speculative
    tokens = gamma + 1 if acceptance == 1 else (1 - acceptance ** (gamma + 1)) / (1 - acceptance)
    return over_speculative * tokens / (cost * gamma + 1)
