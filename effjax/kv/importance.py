"""What the scores of a cache mean: which queries count, what each gives to a slot, and how the past fades."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.kv.checks import check_whole
from effjax.kv.order import order_statistic

_BITS_OF_ONE = 0x3F800000  # 1.0 in float32; bit patterns of non-negative floats order as the floats do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """How attention adds up to the `scores` of a cache: a weighed sum over queries, taken inside attention.

    A query gives each slot that it sees its attention weight, or 1 where the slot is pivotal for it (with `quantile` or
    `multiple`) and 0 where not. The threshold is relative to the slots that the query sees: a threshold of the whole
    text, one over its length, would mark nearly every slot of a cache from which much was evicted.

    Attributes:
        quantile: a slot is pivotal above this quantile of the weights that the query gives.
        multiple: a slot is pivotal above this multiple of the mean weight, `multiple / slots seen`.
        history: queries fade by a factor `1 - 1/history` with each later one, which needs no state besides the scores
            and does not depend on how a text was cut into calls.
        window: only the last `window` valid queries of a call count. Where a call is shorter, as a step of decoding is,
            what came before is scaled by `1 - queries / window`: the share of the window that it still makes up.
        peaked: a query counts pivotal slots by its largest weight instead of by 1. One that attends to all slots alike
            prefers none of them, and its ranks say little about what is needed; one that looks something up does.

    The default, with none of them, is the attention that each token has received since it was written.

    Raises:
        ConfigError: a value out of range, or two that exclude each other.

    Example:
        >>> Importance(window=2).query_weights(jnp.array([3, 1]), 4).tolist()
        [[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """

    quantile: float | None = None
    multiple: float | None = None
    history: int | None = None
    window: int | None = None
    peaked: bool = False

    def __post_init__(self) -> None:
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ConfigError(f"Importance: quantile must be between 0 and 1, found {self.quantile!r}")
        if self.multiple is not None and not 0 < self.multiple < float("inf"):
            raise ConfigError(f"Importance: multiple must be a positive number, found {self.multiple!r}")
        for name, least in (("history", 2), ("window", 1)):
            value = getattr(self, name)
            if value is not None:
                check_whole("Importance", name, value, least)
        for one, two in (("quantile", "multiple"), ("history", "window")):
            if getattr(self, one) is not None and getattr(self, two) is not None:
                raise ConfigError(f"Importance: {one} and {two} exclude each other; leave one of them None")
        if self.peaked and not self.counts_pivotal:
            raise ConfigError("Importance: peaked is of pivotal slots; give quantile or multiple with it")

    @property
    def counts_pivotal(self) -> bool:
        """Whether queries count pivotal slots instead of adding their weights."""
        return self.quantile is not None or self.multiple is not None

    def query_weights(self, lengths: Int[Array, " batch"], queries: int) -> Float[Array, "batch queries"]:
        """What each query of a call counts; row `b` has `lengths[b]` valid ones, padding counts nothing."""
        shape = (lengths.shape[0], queries)
        step, end = jax.lax.broadcasted_iota(jnp.int32, shape, 1), lengths[:, None]
        valid = step < end
        if self.window is not None:
            valid = valid & (step >= end - self.window)
        weights = valid.astype(jnp.float32)
        if self.history is None:
            return weights
        return weights * jnp.exp(math.log1p(-1 / self.history) * jnp.maximum(end - 1 - step, 0).astype(jnp.float32))

    def retained(self, lengths: Int[Array, " batch"]) -> Float[Array, " batch"] | None:
        """The factor of earlier scores in a call of `lengths` valid queries; None where it is always 1."""
        count = lengths.astype(jnp.float32)
        if self.window is not None:
            return jnp.maximum(1 - count / self.window, 0)
        if self.history is not None:
            return jnp.exp(math.log1p(-1 / self.history) * count)
        return None

    def pivotal(
        self,
        powers: Float[Array, "*any slots"],
        inverse: Float[Array, "*any"],
        seen: Bool[Array, "*any slots"],
    ) -> Float[Array, "*any slots"]:
        """What each slot is counted: 1 where it is pivotal, or the largest weight if `peaked`, and 0 elsewhere.

        The weights of attention are `powers * inverse`; the largest power is 1, so the largest weight is `inverse`.
        """
        visible = jnp.sum(seen, axis=-1, keepdims=True, dtype=jnp.int32)
        if self.multiple is not None:
            above = powers * inverse[..., None] * visible.astype(jnp.float32) > self.multiple
        else:
            assert self.quantile is not None
            index = jnp.floor(self.quantile * jnp.maximum(visible - 1, 0).astype(jnp.float32)).astype(jnp.int32)
            bits = jax.lax.bitcast_convert_type(powers, jnp.int32)
            shown = jnp.where(seen, bits, jnp.iinfo(jnp.int32).max)
            above = bits > order_statistic(shown, index, low=0, high=_BITS_OF_ONE)
        hits = (above & seen).astype(jnp.float32)
        return hits * inverse[..., None] if self.peaked else hits

    def add(
        self,
        scores: Float[Array, "*layers batch kv_heads slots"],
        received: Float[Array, "*layers batch kv_heads slots"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "*layers batch kv_heads slots"]:
        """Scores after a call of `lengths` valid queries that gave `received`."""
        factor = self.retained(lengths)
        return scores + received if factor is None else scores * factor[:, None, None] + received


ATTENTION_RECEIVED = Importance()
