"""Uniform sampling: every example once an epoch, in an order that is new each time and never stored."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from effjax.data.sampler import Draw, Position, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Without replacement by epoch. The state is twelve bytes for any number of examples.

    Example:
        >>> import jax
        >>> sampler = Uniform()
        >>> state = sampler.init(10**8, Spec(seed=1))
        >>> ids, weights = sampler.draw(state, jax.random.key(0), 4)
        >>> state = sampler.update(state, ids, jnp.zeros(4))
        >>> ids.shape, weights.tolist(), int(state.offset)
        ((4,), [1.0, 1.0, 1.0, 1.0], 4)
    """

    def init(self, n: int, spec: Spec) -> Position:
        """The start of the first epoch."""
        return Position.make(n, seed=spec.seed)

    def draw(self, state: Position, key: Key[Array, ""], batch: int) -> Draw:
        """The next `batch` examples; the key is not used, since the order of an epoch is one draw."""
        del key
        return state.take(batch), jnp.ones(batch)

    def update(self, state: Position, ids: Int32[Array, " batch"], losses: Float[Array, " batch"]) -> Position:
        """Behind the batch."""
        del losses
        return state.advance(ids.shape[0])
