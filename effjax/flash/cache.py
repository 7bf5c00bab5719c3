"""The neuron cache: rows of the neurons that the last tokens used, packed at the front of memory set aside once.

Source: Alizadeh et al., LLM in a flash (2023), sections 3.1 and 3.3.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int, UInt8

from effjax.errors import ConfigError
from effjax.flash.reader import aligned_empty

MOVED_AT_ONCE = 16
NEVER = np.iinfo(np.int64).min // 2  # the token before all tokens, when no neuron was used


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NeuronCache:
    """One layer's neurons in memory; row `i < count` of the matrix belongs to neuron `pointer[i]`, in no order.

    Attributes:
        matrix: rows, uint8 `[capacity, stride]`. The one field that updates write in place.
        pointer: int64 `[capacity]`, -1 behind `count`.
        count: rows in use.
        last_used: int64 `[neurons]`, the token that last used each neuron.
    """

    matrix: UInt8[np.ndarray, "capacity stride"]
    pointer: Int[np.ndarray, " capacity"]
    count: int
    last_used: Int[np.ndarray, " neurons"]

    @property
    def capacity(self) -> int:
        return len(self.pointer)

    @property
    def resident(self) -> Bool[np.ndarray, " neurons"]:
        mask = np.zeros(len(self.last_used), bool)
        mask[self.pointer[: self.count]] = True
        return mask


def empty_cache(neurons: int, capacity: int, stride: int) -> NeuronCache:
    """Room for `capacity` rows of `stride` bytes, on whole pages.

    Raises:
        ConfigError: a capacity above the number of neurons, or below 0.
        MemoryError: the system gives no more.
    """
    if not 0 <= capacity <= neurons:
        raise ConfigError(f"empty_cache: capacity={capacity} for {neurons} neurons; must be between 0 and their number")
    return NeuronCache(
        matrix=aligned_empty(capacity, stride),
        pointer=np.full(capacity, -1),
        count=0,
        last_used=np.full(neurons, NEVER),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What one token changes.

    Attributes:
        evicted: neurons that leave.
        moved_from, moved_to: rows that are copied over the holes they leave, in this order.
        loaded: neurons that come, in ascending order; they go behind the rows that stay.
        passing: neurons that are needed and find no room: they are read for this token and not kept.
        count: rows in use afterwards.
        last_used: afterwards.
    """

    evicted: Int[np.ndarray, " e"]
    moved_from: Int[np.ndarray, " h"]
    moved_to: Int[np.ndarray, " h"]
    loaded: Int[np.ndarray, " l"]
    passing: Int[np.ndarray, " p"]
    count: int
    last_used: Int[np.ndarray, " neurons"]

    @property
    def needed(self) -> int:
        """Rows to read."""
        return len(self.loaded) + len(self.passing)


def plan_update(cache: NeuronCache, active: Bool[np.ndarray, " neurons"], token: int, window: int) -> Plan:
    """What leaves and what comes for a token; changes nothing.

    A neuron stays as long as one of the last `window` tokens, this one included, used it. Rows of these are at the
    front afterwards, those that come behind them: a row that stays and lies too far back fills a hole.

    Args:
        active: neurons that the token uses.
        token: its number, above that of the update before.
        window: in tokens, at least 1.

    Raises:
        ConfigError: a window below 1.

    Example:
        >>> cache = empty_cache(neurons=4, capacity=2, stride=1)
        >>> plan = plan_update(cache, np.array([True, True, False, True]), token=0, window=5)
        >>> plan.loaded.tolist(), plan.passing.tolist()
        ([0, 1], [3])
    """
    if window < 1:
        raise ConfigError(f"plan_update: window={window}; must be at least 1 token")
    last_used = np.where(active, token, cache.last_used)
    held = cache.pointer[: cache.count]
    stays = token - last_used[held] < window
    left = int(stays.sum())
    needed = np.flatnonzero(active & ~cache.resident)
    room = cache.capacity - left
    return Plan(
        evicted=held[~stays],
        moved_from=left + np.flatnonzero(stays[left:]),
        moved_to=np.flatnonzero(~stays[:left]),
        loaded=needed[:room],
        passing=needed[room:],
        count=left + min(room, len(needed)),
        last_used=last_used,
    )


def apply_update(
    cache: NeuronCache, plan: Plan, read: Callable[[Int[np.ndarray, " l"], np.ndarray, Int[np.ndarray, " l"]], object]
) -> NeuronCache:
    """The cache after a plan. It takes over the memory of the old one, which is not to be used any more.

    Args:
        plan: made for this very cache.
        read: `read(neurons, matrix, rows)` puts the row of neuron `i` at `matrix[rows[i]]`.

    Example:
        >>> cache = empty_cache(neurons=4, capacity=2, stride=1)
        >>> plan = plan_update(cache, np.array([False, True, False, True]), token=0, window=5)
        >>> def read(neurons, matrix, rows):
        ...     matrix[rows, 0] = 10 * neurons
        >>> after = apply_update(cache, plan, read)
        >>> after.pointer.tolist(), after.matrix[:, 0].tolist()
        ([1, 3], [10, 30])
    """
    pointer = cache.pointer.copy()
    pointer[plan.moved_to] = pointer[plan.moved_from]
    for i in range(0, len(plan.moved_to), MOVED_AT_ONCE):  # each time a copy of so many rows is held
        some = slice(i, i + MOVED_AT_ONCE)
        cache.matrix[plan.moved_to[some]] = cache.matrix[plan.moved_from[some]]
    rows = np.arange(plan.count - len(plan.loaded), plan.count)
    read(plan.loaded, cache.matrix, rows)
    pointer[rows] = plan.loaded
    pointer[plan.count :] = -1
    return NeuronCache(matrix=cache.matrix, pointer=pointer, count=plan.count, last_used=plan.last_used)
