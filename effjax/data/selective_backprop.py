"""Selective backprop: a forward pass over more examples than are trained on, and a choice by the losses it finds."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped

from effjax.data.inclusion import inclusion_probabilities, systematic
from effjax.data.sampler import Draw, Position, Spec
from effjax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HistoryState:
    """Attributes:
    position: in the shuffled epochs of candidates.
    history: `float32[history]`, recent losses, NaN where there were none yet.
    next: int32 scalar, the place of the next one.
    """

    position: Position
    history: Shaped[Array, " history"]
    next: Shaped[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveBackprop:
    """Keeps a candidate with a probability that grows with its loss's rank among recent ones (Jiang et al. 2019).

    `draw` gives uniform candidates. After a forward pass over them, `choose` picks those that are worth a backward
    pass, a fixed number, so that one program serves all steps; `update` takes the losses of all candidates.

    Attributes:
        power: of the rank in [0, 1]: 0 is uniform, higher is more selective.
        history: losses that ranks are taken among.
        weighted: as in `effjax.data.NWS`.

    Example:
        >>> sampler = SelectiveBackprop(power=2.0, history=8)
        >>> state = sampler.init(20, Spec())
        >>> ids, _ = sampler.draw(state, jax.random.key(0), 8)
        >>> losses = jnp.arange(8.0)
        >>> state = sampler.update(state, ids, losses)
        >>> chosen, weights = sampler.choose(state, jax.random.key(1), losses, 2)
        >>> chosen.shape, float(losses[chosen].mean()) > 3.5
        ((2,), True)
    """

    power: float = 1.0
    history: int = 1024
    weighted: bool = False

    def __post_init__(self):
        if self.power < 0 or self.history < 1:
            raise ConfigError(f"power={self.power}, history={self.history}: at least 0; at least 1")

    def init(self, n: int, spec: Spec) -> HistoryState:
        """No losses yet."""
        position, start = Position.make(n, seed=spec.seed), jnp.zeros((), jnp.int32)
        return HistoryState(position=position, history=jnp.full(self.history, jnp.nan), next=start)

    def draw(self, state: HistoryState, key: Key[Array, ""], batch: int) -> Draw:
        """The next `batch` candidates."""
        del key
        return state.position.take(batch), jnp.ones(batch)

    def choose(
        self, state: HistoryState, key: Key[Array, ""], losses: Float[Array, " candidates"], batch: int
    ) -> tuple[Int32[Array, " batch"], Float[Array, " batch"]]:
        """Places of `batch` of the candidates, and weights."""
        known = jnp.maximum((~jnp.isnan(state.history)).sum(), 1)
        below = (state.history[None] <= losses[:, None]).sum(-1)  # a comparison with NaN is false
        rank = jnp.where(jnp.isnan(state.history).all(), 1.0, below / known)
        places, weights = systematic(key, inclusion_probabilities(rank**self.power, batch), batch)
        return places, weights if self.weighted else jnp.ones(batch)

    def update(
        self, state: HistoryState, ids: Int32[Array, " candidates"], losses: Float[Array, " candidates"]
    ) -> HistoryState:
        """Behind the candidates, with their losses (the last ones, where they are more than the history holds)."""
        count = min(ids.shape[0], self.history)
        places = (state.next + jnp.arange(count, dtype=jnp.int32)) % self.history
        history = state.history.at[places].set(losses[-count:].astype(jnp.float32))
        position = state.position.advance(ids.shape[0])
        return HistoryState(position=position, history=history, next=(state.next + count) % self.history)
