"""One number an example, kept from step to step: the last loss seen of each, or losses of all found by a full pass."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped

from effjax.data.inclusion import inclusion_probabilities, systematic
from effjax.data.sampler import Draw, Position, Spec
from effjax.data.shuffle import shuffled
from effjax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TableState:
    """Attributes:
    position: in the shuffled epochs of candidates.
    steps: int32 scalar, updates so far.
    losses: `float32[n]`, NaN where an example was not seen.
    """

    position: Position
    steps: Shaped[Array, ""]
    losses: Shaped[Array, " n"]


def table_state(n: int, spec: Spec) -> TableState:
    """The start, with `spec.scores` where they are given."""
    losses = jnp.full(n, jnp.nan) if spec.scores is None else jnp.asarray(spec.scores, jnp.float32)
    if losses.shape != (n,):
        raise ConfigError(f"scores {list(losses.shape)} for n={n}: give one an example")
    return TableState(position=Position.make(n, seed=spec.seed), steps=jnp.zeros((), jnp.int32), losses=losses)


def known_or_mean(losses: Float[Array, " m"]) -> Float[Array, " m"]:
    """Losses, the unseen ones replaced by the mean of the others; all 1 where none was seen."""
    seen = ~jnp.isnan(losses)
    mean = jnp.where(seen, losses, 0.0).sum() / jnp.maximum(seen.sum(), 1)
    return jnp.where(seen, losses, jnp.where(seen.any(), mean, 1.0))


def in_any_order(key: Key[Array, ""], n: int) -> Int32[Array, " n"]:
    """All examples shuffled: equal strides through an order that is always the same would draw the same company."""
    return shuffled(jnp.arange(n, dtype=jnp.int32), n, jax.random.bits(key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaleLoss:
    """Draws by the last loss seen of each example (online batch selection, Loshchilov and Hutter 2015).

    It costs no forward pass, but four bytes an example, and knows nothing of an example before its first visit: in a
    single pass over data it is uniform sampling.

    Attributes:
        pool: candidates for each example of the batch; None for all examples.
        uniform: share of the probability given to all candidates alike.
        warmup: steps of uniform sampling.
        weighted: as in `effjax.data.NWS`.

    Example:
        >>> sampler = StaleLoss(uniform=0.0, pool=None, warmup=0)
        >>> state = sampler.init(4, Spec(scores=jnp.array([1.0, 0.0, 0.0, 1.0])))
        >>> sorted(sampler.draw(state, jax.random.key(0), 2)[0].tolist())
        [0, 3]
    """

    pool: int | None = 4
    uniform: float = 0.3
    warmup: int = 20
    weighted: bool = False

    def __post_init__(self):
        if (self.pool is not None and self.pool < 1) or not 0 <= self.uniform <= 1 or self.warmup < 0:
            raise ConfigError(f"{self}: pool at least 1 or None, uniform from 0 to 1, warmup at least 0")

    def init(self, n: int, spec: Spec) -> TableState:
        """Nothing seen, or `spec.scores`."""
        return table_state(n, spec)

    def draw(self, state: TableState, key: Key[Array, ""], batch: int) -> Draw:
        """`batch` of the candidates."""
        n = state.position.n
        order, key = jax.random.split(key)
        candidates = in_any_order(order, n) if self.pool is None else state.position.take(self._pool(n, batch))
        scores = jnp.where(state.steps < self.warmup, 1.0, known_or_mean(state.losses[candidates]))
        index, weights = systematic(key, inclusion_probabilities(scores, batch, uniform=self.uniform), batch)
        return candidates[index], weights if self.weighted else jnp.ones(batch)

    def update(self, state: TableState, ids: Int32[Array, " batch"], losses: Float[Array, " batch"]) -> TableState:
        """With these losses in the table."""
        position = state.position.advance(self._pool(state.position.n, ids.shape[0]))
        table = state.losses.at[ids].set(losses.astype(jnp.float32))
        return dataclasses.replace(state, position=position, steps=state.steps + 1, losses=table)

    def _pool(self, n: int, batch: int) -> int:
        return batch if self.pool is None else min(self.pool * batch, n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactLoss:
    """Draws from all examples by their true losses, which a forward pass over all of them finds every few steps.

    The best that sampling by loss can do, and the costly baseline: call `refresh` wherever `due` says so.

    Attributes:
        every: steps between two passes.
        uniform: share of the probability given to all examples alike.
        weighted: as in `effjax.data.NWS`.

    Example:
        >>> sampler = ExactLoss(every=10)
        >>> state = sampler.init(4, Spec())
        >>> bool(sampler.due(state))
        True
        >>> state = sampler.refresh(state, jnp.array([0.0, 5.0, 0.0, 0.0]))
        >>> 1 in sampler.draw(state, jax.random.key(0), 2)[0]
        True
    """

    every: int = 10
    uniform: float = 0.3
    weighted: bool = False

    def __post_init__(self):
        if self.every < 1 or not 0 <= self.uniform <= 1:
            raise ConfigError(f"every={self.every}, uniform={self.uniform}: at least 1; from 0 to 1")

    def init(self, n: int, spec: Spec) -> TableState:
        """Nothing known, or `spec.scores`."""
        return table_state(n, spec)

    def due(self, state: TableState) -> jax.Array:
        """Whether a pass is due before the next draw."""
        return state.steps % self.every == 0

    def refresh(self, state: TableState, losses: Float[Array, " n"]) -> TableState:
        """With the losses of all examples."""
        return dataclasses.replace(state, losses=losses.astype(jnp.float32))

    def draw(self, state: TableState, key: Key[Array, ""], batch: int) -> Draw:
        """`batch` of all examples."""
        order, key = jax.random.split(key)
        candidates = in_any_order(order, state.position.n)
        probabilities = inclusion_probabilities(known_or_mean(state.losses)[candidates], batch, uniform=self.uniform)
        index, weights = systematic(key, probabilities, batch)
        return candidates[index], weights if self.weighted else jnp.ones(batch)

    def update(self, state: TableState, ids: Int32[Array, " batch"], losses: Float[Array, " batch"]) -> TableState:
        """One step on; losses of a batch are not kept, since a pass finds them all at one moment."""
        del losses
        return dataclasses.replace(state, position=state.position.advance(ids.shape[0]), steps=state.steps + 1)
