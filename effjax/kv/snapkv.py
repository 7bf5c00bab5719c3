"""SnapKV: tokens to which the last queries of a prompt attend, and neighbours; PyramidKV: more in low layers."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache
from effjax.kv.checks import check_whole
from effjax.kv.importance import Importance
from effjax.kv.method import RankedMethod

_NARROWEST = 2  # tokens that the paper's smallest caches leave the last layer besides the window: (64 - 8) // 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(RankedMethod):
    """Keeps the last `window` tokens and those before to which their queries attend most, scores averaged nearby.

    The scores of tokens before the window are averaged over `kernel` neighbouring slots, beyond the ends of which there
    are zeros. The paper evicts once, behind the prompt; in `generate` a chunk of a prompt is evicted by its own last
    queries, and full rows while decoding by the last `window` ones, in which older queries fade linearly (see
    `Importance`). Paper: window 32, kernel 7, maximum in place of mean; here as in kvpress, window 64, kernel 5, mean.

    Attributes:
        budget: see `EvictionMethod`.
        window: queries that are looked at and tokens that always stay.
        kernel: slots that are averaged, odd.
        drop: see `RankedMethod`.

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> SnapKV(budget=128, window=32).importance.window
        32

    Source: Li et al., SnapKV (2024), section 4.
    """

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        check_whole("SnapKV", "window", self.window, 1)
        check_whole("SnapKV", "kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ConfigError(f"SnapKV: kernel must be odd, found {self.kernel}")
        super().__post_init__()

    @property
    def importance(self) -> Importance:
        return Importance(window=self.window)

    def newest(self, budget: int) -> int:
        return self.window

    def rank_by(self, cache: KVCache, budget: int) -> Float[Array, "layers batch kv_heads slots"]:
        del budget
        slot = jax.lax.broadcasted_iota(jnp.int32, cache.positions.shape, cache.positions.ndim - 1)
        scores = jnp.where(slot < cache.length[..., None] - self.window, cache.scores, 0.0)
        ones = (1,) * (scores.ndim - 1)
        half = self.kernel // 2
        return jax.lax.reduce_window(
            scores, 0.0, jax.lax.add, (*ones, self.kernel), (*ones, 1), [(0, 0)] * len(ones) + [(half, half)]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """`SnapKV` with budgets that fall linearly from the first layer to the last, their mean `budget`.

    Besides the window, the last layer has `(budget - window) / beta` tokens and the first what makes the mean right.
    Where that leaves the last layer less than 2, the least that the paper has, all layers keep `budget` as with
    `SnapKV`: a layer that chooses next to nothing is a loss that the others do not make good.

    Attributes:
        budget: mean of the layers', a whole number or a share.
        window, kernel, drop: see `SnapKV`.
        beta: how much less than the mean the last layer has.

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> PyramidKV(budget=128, window=28, beta=10).layer_budgets(4)
        (218, 158, 98, 38)
        >>> PyramidKV(budget=46, window=28, beta=10).layer_budgets(4)
        (46, 46, 46, 46)

    Source: Cai et al., PyramidKV (2024), section 3.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        check_whole("PyramidKV", "beta", self.beta, 1)
        if isinstance(self.budget, tuple):
            raise ConfigError(f"PyramidKV: budget is the mean of the layers, one number, found {self.budget!r}")
        super().__post_init__()

    def layer_budgets(self, layers: int) -> tuple[int, ...]:
        budget = super().layer_budgets(layers)[0]
        extra = budget - self.window
        least = extra // self.beta
        if layers == 1 or least < _NARROWEST:
            return (budget,) * layers
        steps = [(2 * extra - 2 * least) * (layers - 1 - i) / (layers - 1) for i in range(layers)]
        return tuple(self.window + least + round(step) for step in steps)

    def of_layer(self, layer: int, layers: int) -> SnapKV:
        return SnapKV(budget=self.layer_budgets(layers)[layer], window=self.window, kernel=self.kernel, drop=self.drop)
