"""Uniform sampling of a part of the examples: what a pruned dataset is trained with."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped

from effjax.data.sampler import Draw, Position, Spec
from effjax.data.scores import kept_by_score
from effjax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SubsetState:
    """Attributes:
    position: in the shuffled epochs of those that are kept.
    kept: `int32[kept]`, their ids.
    """

    position: Position
    kept: Shaped[Array, " kept"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset:
    """Keeps the share of examples with the highest `Spec.scores`, and draws each once an epoch.

    Scores are `el2n`, `grand` or `prototype_distances`, or any other number.

    Attributes:
        keep: share of the examples.
        easiest: keep the lowest scores instead, which is better where there are few examples.

    Example:
        >>> sampler = Subset(keep=0.5)
        >>> state = sampler.init(4, Spec(scores=jnp.array([0.1, 0.9, 0.5, 0.7])))
        >>> sorted(sampler.draw(state, jax.random.key(0), 2)[0].tolist())
        [1, 3]
    """

    keep: float = 0.5
    easiest: bool = False

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep}: must be above 0 and at most 1")

    def init(self, n: int, spec: Spec) -> SubsetState:
        """The kept examples.

        Raises:
            ConfigError: no scores, or not `n` of them.
        """
        if spec.scores is None or spec.scores.shape != (n,):
            shape = None if spec.scores is None else list(spec.scores.shape)
            raise ConfigError(f"scores {shape} for n={n}: Subset needs Spec(scores=...), one an example")
        kept = kept_by_score(jnp.asarray(spec.scores), self.keep, easiest=self.easiest)
        return SubsetState(position=Position.make(len(kept), seed=spec.seed), kept=kept)

    def draw(self, state: SubsetState, key: Key[Array, ""], batch: int) -> Draw:
        """The next `batch` of the kept ones."""
        del key
        return state.kept[state.position.take(batch)], jnp.ones(batch)

    def update(self, state: SubsetState, ids: Int32[Array, " batch"], losses: Float[Array, " batch"]) -> SubsetState:
        """Behind the batch."""
        del losses
        return dataclasses.replace(state, position=state.position.advance(ids.shape[0]))
