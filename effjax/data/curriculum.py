"""Curricula of image sizes: the range to draw from as training goes on, from small images to large ones."""

import math
from typing import Literal

from effjax.errors import ConfigError


def growing_range(
    progress: float, low: float, high: float, *, until: float = 1.0, kind: Literal["linear", "cosine"] = "linear"
) -> tuple[float, float]:
    """The smallest size stays; the largest grows from it to `high`.

    Args:
        progress: share of the training that is done, from 0 to 1.
        low, high: sizes.
        until: progress at which `high` is reached.
        kind: of the growth; "cosine" stays long at the ends.

    Raises:
        ConfigError: `until` is not in (0, 1], or an unknown kind.

    Example:
        >>> [growing_range(p, 128, 320, until=0.5)[1] for p in (0.0, 0.25, 0.5, 1.0)]
        [128.0, 224.0, 320.0, 320.0]
    """
    if not 0 < until <= 1 or kind not in ("linear", "cosine"):
        raise ConfigError(f"until={until}, kind={kind!r}: above 0 and up to 1; 'linear' or 'cosine'")
    share = min(max(progress / until, 0.0), 1.0)
    if kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return low, low + (high - low) * share


def stepped_range(
    epoch: int, low: int, high: int, *, at: tuple[int, ...] = (40,), factors: tuple[float, float] = (1.0, 1.0)
) -> tuple[int, int]:
    """Both ends grow by a factor of themselves, cut to integers, at certain epochs: the schedule released with CVNets.

    Args:
        epoch: its number.
        low, high: sizes before the first growth.
        at: epochs of growth.
        factors: what is added to each end, as a share of it; 1 doubles.

    Example:
        >>> [stepped_range(e, 128, 160, at=(2, 4), factors=(0.25, 0.5)) for e in (0, 2, 4)]
        [(128, 160), (160, 240), (200, 360)]
    """
    for _ in [growth for growth in at if growth <= epoch]:
        low, high = low + int(low * factors[0]), high + int(high * factors[1])
    return low, high
