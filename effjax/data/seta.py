"""SeTa: a window over clusters of losses that slides from easy to hard examples, epoch after epoch.

After "Scale Efficient Training for Large Datasets" (Zhou et al., CVPR 2025): redundant examples are dropped at random,
the others grouped by loss, and a window of groups moves from easy to hard; the last epochs see all groups. Groups
here have equal sizes (quantiles), which fixes the shapes, where the paper runs k-means on the losses.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped

from effjax.data.loss_table import known_or_mean
from effjax.data.sampler import Draw, Position, Spec
from effjax.data.shuffle import shuffled
from effjax.errors import ConfigError
from effjax.hashing.integers import mix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SeTaState:
    """Attributes:
    position: in the shuffled epochs; an epoch is as long as the window.
    losses: `float32[n]`, the last seen, NaN where an example was not seen.
    order: `int32[n]`, the examples of this epoch, those of the window first.
    """

    position: Position
    losses: Shaped[Array, " n"]
    order: Shaped[Array, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeTa:
    """Trains on `keep * window / groups` of the examples an epoch.

    Attributes:
        keep: share of the examples that is left when others are dropped at random, anew each epoch.
        groups: of equal size, by loss.
        window: groups of an epoch.
        epochs: of the whole training; the window slides over all groups within those before the last `annealing`.
        annealing: epochs at the end that draw from all groups.

    Example:
        >>> sampler = SeTa(keep=1.0, groups=4, window=2, epochs=5, annealing=1)
        >>> state = sampler.init(8, Spec(scores=jnp.arange(8.0)))
        >>> sorted(sampler.draw(state, jax.random.key(0), 4)[0].tolist())  # easy ones first
        [0, 1, 2, 3]
    """

    keep: float = 0.9
    groups: int = 10
    window: int = 5
    epochs: int = 20
    annealing: int = 2

    def __post_init__(self):
        if not 0 < self.keep <= 1 or not 1 <= self.window <= self.groups:
            raise ConfigError(f"keep={self.keep}, window={self.window}: above 0 and up to 1; from 1 to {self.groups}")
        if not 0 <= self.annealing < self.epochs:
            raise ConfigError(f"annealing={self.annealing}: at least 0 and below epochs={self.epochs}")

    def init(self, n: int, spec: Spec) -> SeTaState:
        """No losses, or `spec.scores`.

        Raises:
            ConfigError: fewer examples than the window has groups.
        """
        left = round(self.keep * n)
        size = left * self.window // self.groups
        if size < 1:
            raise ConfigError(f"n={n}: no example is left of keep={self.keep} in {self.window} of {self.groups} groups")
        losses = jnp.full(n, jnp.nan) if spec.scores is None else jnp.asarray(spec.scores, jnp.float32)
        if losses.shape != (n,):
            raise ConfigError(f"scores {list(losses.shape)} for n={n}: give one an example")
        state = SeTaState(
            position=Position.make(size, seed=spec.seed), losses=losses, order=jnp.arange(n, dtype=jnp.int32)
        )
        return self._begun(state)

    def draw(self, state: SeTaState, key: Key[Array, ""], batch: int) -> Draw:
        """The next `batch` of the window. Where an epoch ends within the batch, the rest is of this window again."""
        del key
        return state.order[state.position.take(batch)], jnp.ones(batch)

    def update(self, state: SeTaState, ids: Int32[Array, " batch"], losses: Float[Array, " batch"]) -> SeTaState:
        """With these losses; at the end of an epoch the window is laid anew."""
        position = state.position.advance(ids.shape[0])
        table = state.losses.at[ids].set(losses.astype(jnp.float32))
        later = dataclasses.replace(state, position=position, losses=table)
        return jax.lax.cond(position.epoch > state.position.epoch, self._begun, lambda state: state, later)

    def _begun(self, state: SeTaState) -> SeTaState:
        """The examples left at random, those of the window first, in no other order of importance."""
        n, size, epoch = state.losses.shape[0], state.position.n, state.position.epoch
        left = round(self.keep * n)
        seed = mix(mix(state.position.seed + jnp.uint32(1)) + epoch.astype(jnp.uint32))
        some = shuffled(jnp.arange(n, dtype=jnp.int32), n, seed)
        kept, dropped = some[:left], some[left:]
        by_loss = kept[jnp.argsort(known_or_mean(state.losses[kept]), stable=True)]
        sliding = max(self.epochs - self.annealing - 1, 1)
        start = jnp.minimum(epoch, sliding) * (left - size) // sliding
        order = jnp.concatenate([jnp.roll(by_loss, -start), dropped])
        return dataclasses.replace(state, order=jnp.where(epoch >= self.epochs - self.annealing, some, order))
