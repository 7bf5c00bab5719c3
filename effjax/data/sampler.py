"""What every sampler has: `init`, `draw` and `update` over explicit state, and a place in the shuffled epochs."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped

from effjax.data.shuffle import check_count, shuffled
from effjax.errors import ConfigError
from effjax.hashing.integers import mix

Draw = tuple[Int32[Array, " batch"], Float[Array, " batch"]]
Features = Callable[[jax.Array], jax.Array]  # int32[batch] -> float[batch, dim]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """What a sampler may know of the examples before the first step.

    Attributes:
        seed: of shuffles and hash functions.
        features: `float[n, dim]` to tell examples apart by; or a function of `int32[batch]` ids that gives them, for
            so many examples that nothing may be kept for each.
        scores: `float[n]`, one known number an example, such as `el2n`.
    """

    seed: int = 0
    features: Float[Array, "n dim"] | Features | None = None
    scores: Float[Array, " n"] | None = None


class Sampler(Protocol):
    """Chooses the examples of a step. All three are pure functions that `jax.jit` takes; the state is arrays.

    `draw` does not move on: drawing twice gives the same examples, and only `update` passes them. A state that is saved
    between two steps goes on in the middle of an epoch as if nothing had been. All hosts hold the same state and draw
    the same ids; `of_host` is a host's part of them, so that the number of hosts changes nothing.
    """

    def init(self, n: int, spec: Spec) -> Any:
        """The state before the first step, for examples `0` to `n - 1`."""
        ...

    def draw(self, state: Any, key: Key[Array, ""], batch: int) -> Draw:
        """Ids and weights: `mean(weights * losses)` is what a step makes smaller."""
        ...

    def update(self, state: Any, ids: Int32[Array, " batch"], losses: Float[Array, " batch"]) -> Any:
        """The state after the step, with what it found."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Position:
    """A place in a sequence of epochs, each in an order of its own.

    Attributes:
        epoch: int32 scalar.
        offset: int32 scalar in `[0, n)`, examples of the epoch that are done.
        seed: uint32 scalar.
        n: number of examples.

    Example:
        >>> start = Position.make(10, seed=0)
        >>> first, rest = start.take(6), start.advance(6).take(4)
        >>> sorted(first.tolist() + rest.tolist()), int(start.advance(12).epoch)
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 1)
    """

    epoch: Shaped[Array, ""]
    offset: Shaped[Array, ""]
    seed: Shaped[Array, ""]
    n: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def make(cls, n: int, *, seed: int) -> "Position":
        """The start of the first epoch.

        Raises:
            ConfigError: `n` is below 1 or above 2**30.
        """
        check_count(n)
        epoch, offset = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two buffers, so that both can be donated
        return cls(epoch=epoch, offset=offset, seed=jnp.asarray(seed & 0xFFFFFFFF, jnp.uint32), n=n)

    def take(self, count: int) -> Int32[Array, " count"]:
        """The next `count` examples, across the end of an epoch where it comes.

        Raises:
            ConfigError: more than there are in an epoch.
        """
        if not 1 <= count <= self.n:
            raise ConfigError(f"{count} of {self.n} examples at once: draw between 1 and all of them")
        positions = self.offset + jnp.arange(count, dtype=jnp.int32)
        beyond = positions >= self.n
        epoch = (self.epoch + beyond).astype(jnp.uint32)
        return shuffled(positions - beyond * self.n, self.n, mix(self.seed) + epoch)

    def advance(self, count: int) -> "Position":
        """Behind the next `count`."""
        offset = self.offset + count
        beyond = (offset >= self.n).astype(jnp.int32)
        return dataclasses.replace(self, epoch=self.epoch + beyond, offset=offset - beyond * self.n)


def of_host(drawn: Any, host: int, hosts: int) -> Any:
    """The part of `host` of what was drawn, `hosts` equal parts in order; any pytree of `[batch, ...]`.

    Raises:
        ConfigError: the batch does not divide, or no such host.

    Example:
        >>> of_host(jnp.arange(6), 1, 3).tolist()
        [2, 3]
    """
    if not 0 <= host < hosts:
        raise ConfigError(f"host={host} of hosts={hosts}: must be from 0 to {hosts - 1}")

    def part(x: jax.Array) -> jax.Array:
        if x.shape[0] % hosts:
            raise ConfigError(f"hosts={hosts} does not divide a batch of {x.shape[0]}: choose a multiple")
        size = x.shape[0] // hosts
        return x[host * size : (host + 1) * size]

    return jax.tree.map(part, drawn)
