"""Persistence of importance: whether tokens that were pivotal stay so, and budgets of layers from it."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.errors import ConfigError


def pivotal_set(
    attention: Float[Array, "*any length length"], start: int, stop: int, *, multiple: float = 1.0
) -> Bool[Array, "*any length"]:
    """Tokens that some query from `start` to before `stop` gives more than `multiple / t`, `t` the tokens it sees."""
    seen = jnp.arange(start + 1, stop + 1, dtype=jnp.float32)
    return jnp.any(attention[..., start:stop, :] > (multiple / seen)[:, None], axis=-2)


def persistence(
    attention: Float[Array, "*any length length"], split: int, *, multiple: float = 1.0
) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """How many of the tokens that are pivotal later were so before.

    Args:
        attention: causal weights, query by key: row `t` sums to 1 over keys 0 to `t`.
        split: queries before it are the first part; half the length in the paper.
        multiple: of `1/t`, above which a token is pivotal.

    Returns:
        The ratio `|later and before| / |later|`, of tokens below `split` alone (nan where none is pivotal later), and
        the share `|before| / split`. A ratio near the share is chance: the share must be well below 1.

    Raises:
        ConfigError: `split` leaves one part without queries.

    Example:
        >>> weights = jnp.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0.8, 0.1, 0.1, 0], [0.7, 0.1, 0.1, 0.1]])
        >>> [float(x) for x in persistence(weights, 2)]
        [1.0, 0.5]

    Source: Liu et al., Scissorhands (2023), section 3.1 and definition 3.2; a token's own query counts too, but of the
    first query (`t = 1`, weight 1) nothing exceeds `1/t`.
    """
    length = attention.shape[-1]
    if not 0 < split < length:
        raise ConfigError(f"persistence: split must be from 1 to {length - 1}, found {split}")
    before = pivotal_set(attention, 0, split, multiple=multiple)[..., :split]
    later = pivotal_set(attention, split, length, multiple=multiple)[..., :split]
    both = jnp.sum(before & later, axis=-1, dtype=jnp.float32)
    return both / jnp.sum(later, axis=-1, dtype=jnp.float32), jnp.mean(before.astype(jnp.float32), axis=-1)


def layer_budgets(ratios: Sequence[float], budget: int, *, even: float = 0.5) -> tuple[int, ...]:
    """Budgets of layers from their persistence: more for layers whose pivotal tokens change.

    The paper gives later layers more because their ratio is lower, but no rule; here the share `even` of all tokens is
    divided evenly and the rest in proportion to `1 - ratio`.

    Args:
        ratios: of each layer, as the mean over its heads of what `persistence` gives.
        budget: mean of the layers' budgets.
        even: between 0 and 1.

    Returns:
        Whole tokens of each layer, at least 1, their sum `len(ratios) * budget`; for the budget of a method.

    Raises:
        ConfigError: a ratio out of [0, 1], or too small a budget.

    Example:
        >>> layer_budgets([0.99, 0.97, 0.9], 64)
        (39, 53, 100)
    """
    missed = 1 - np.asarray(ratios, np.float64)
    if missed.ndim != 1 or not len(missed) or not ((missed >= 0) & (missed <= 1)).all():
        raise ConfigError(f"layer_budgets: ratios must be one number from 0 to 1 a layer, found {list(ratios)}")
    if not 0 <= even <= 1 or budget < 1:
        raise ConfigError(f"layer_budgets: budget must be at least 1 and even from 0 to 1, found {budget}, {even}")
    total = len(missed) * budget
    spread = missed / missed.sum() if missed.sum() > 0 else np.full(len(missed), 1 / len(missed))
    wanted = budget * even + (1 - even) * total * spread
    whole = np.floor(wanted).astype(int)
    behind = np.argsort(whole - wanted, kind="stable")[: total - whole.sum()]
    whole[behind] += 1
    if whole.min() < 1:
        raise ConfigError(f"layer_budgets: a budget of {budget} gives a layer nothing: {whole.tolist()}; raise even")
    return tuple(int(count) for count in whole)
