"""The Nadaraya-Watson sketch (NWS): the loss of examples like this one, from losses already seen, in constant time.

Two RACE sketches hold the kernel sums of losses and of ones over all examples trained on; their ratio is the
Nadaraya-Watson estimate of the loss at any input, also at one never visited (arXiv 2311.13583; the sampler around the
estimate, with its pools and inclusion probabilities, is ours).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped

from effjax.data.inclusion import inclusion_probabilities, systematic
from effjax.data.sampler import Draw, Features, Position, Spec
from effjax.errors import ConfigError
from effjax.hashing.lsh import SignProjections
from effjax.hashing.race import Race

_PROBED = 4096  # examples whose mean feature is taken out before hashing
_CODED = 8192  # examples hashed at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NWSketch:
    """Kernel sums of losses and of ones, as one sketch of two outputs.

    Attributes:
        sums: the counts, `float32[rows, cells, 2]`, and their totals.

    Example:
        >>> lsh = SignProjections.make(jax.random.key(0), dim=2, rows=500, hashes=2)
        >>> codes = lsh(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
        >>> sketch = NWSketch.make(rows=500, cells=lsh.buckets).insert(codes, jnp.array([1.0, 3.0]))
        >>> bool(sketch.query(codes)[0] < 1.6 < 2.4 < sketch.query(codes)[1])
        True
    """

    sums: Race

    @classmethod
    def make(cls, *, rows: int, cells: int) -> "NWSketch":
        """An empty sketch."""
        return cls(sums=Race.make(rows=rows, buckets=cells, outputs=(2,), rehashed=False))

    def insert(self, codes: Int32[Array, "n rows"], losses: Float[Array, " n"]) -> "NWSketch":
        """With the losses of examples of these codes."""
        losses = losses.astype(jnp.float32)
        return NWSketch(sums=self.sums.add(codes, jnp.stack([losses, jnp.ones_like(losses)], -1)))

    def query(self, codes: Int32[Array, "*batch rows"], *, groups: int | None = None) -> Float[Array, "*batch"]:
        """The estimated losses; the mean of all losses where nothing near was seen, and 1 where nothing was.

        Args:
            codes: of the queries.
            groups: of rows, for the medians of means of both sums; None for their means.
        """
        sums = self.sums.query(codes, groups=groups)
        everywhere = _ratio(self.sums.total[0], self.sums.total[1], jnp.float32(1.0))
        return _ratio(sums[..., 0], sums[..., 1], everywhere)

    def forget(self, factor: float) -> "NWSketch":
        """All that was seen weighs `factor` times as much."""
        return NWSketch(sums=self.sums.scaled(factor))


def _ratio(numerator: jax.Array, denominator: jax.Array, otherwise: jax.Array) -> jax.Array:
    seen = denominator > 1e-20  # what is far below one forgotten example is rounding
    return jnp.where(seen, numerator / jnp.where(seen, denominator, 1.0), otherwise)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NWSState:
    """Attributes:
    position: in the shuffled epochs of candidates.
    steps: int32 scalar, updates so far.
    sketch: of the losses.
    lsh: the hash functions.
    middle: `float32[dim]`, taken from features before hashing.
    codes: `uint[n, rows]` of all examples; None where features are a function, and are hashed when they are needed.
    features: that function, or None.
    """

    position: Position
    steps: Shaped[Array, ""]
    sketch: NWSketch
    lsh: SignProjections
    middle: Shaped[Array, " dim"]
    codes: Shaped[Array, "n rows"] | None
    features: Features | None = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NWS:
    """Draws examples whose estimated loss is high, out of a pool of candidates that comes round like a uniform batch.

    What a step costs does not depend on the number of examples, nor on how many were seen: `pool * batch` candidates
    are looked up, `batch` of them trained on. The pool is the next part of a shuffled epoch, so that one pass over data
    that is never seen twice is the normal case.

    Attributes:
        rows: independent hash functions. The error of the kernel sums falls as one over their root.
        hashes: bits of each: higher means a narrower kernel. Choose by how well estimates rank losses not yet seen.
        decay: of what was seen, every step; losses fall while training.
        pool: candidates for each example of the batch; 1 is uniform sampling.
        uniform: share of the probability given to all candidates alike.
        warmup: steps of uniform sampling, until the sketch is filled.
        groups: of rows, for medians of means; None for means.
        weighted: whether weights make the mean of the batch an unbiased estimate of the mean over all examples.
            Without, hard examples count as often as they are drawn: another objective, often the faster one.

    Raises:
        ConfigError: a setting out of its range.

    Example:
        >>> features = jax.random.normal(jax.random.key(0), (100, 5))
        >>> sampler = NWS(rows=16, hashes=4, warmup=0)
        >>> state = sampler.init(100, Spec(features=features))
        >>> ids, weights = sampler.draw(state, jax.random.key(1), 8)
        >>> state = sampler.update(state, ids, jnp.ones(8))
        >>> len(set(ids.tolist())), int(state.position.offset)
        (8, 32)
    """

    rows: int = 64
    hashes: int = 8
    decay: float = 0.98
    pool: int = 4
    uniform: float = 0.3
    warmup: int = 20
    groups: int | None = None
    weighted: bool = False

    def __post_init__(self):
        if self.rows < 1 or not 1 <= self.hashes <= 16 or self.pool < 1 or self.warmup < 0:
            raise ConfigError(f"{self}: rows and pool at least 1, hashes from 1 to 16, warmup at least 0")
        if not 0 < self.decay <= 1 or not 0 <= self.uniform <= 1:
            raise ConfigError(f"decay={self.decay}, uniform={self.uniform}: above 0 and up to 1; from 0 to 1")
        if self.groups is not None and (self.groups < 1 or self.rows % self.groups):
            raise ConfigError(f"groups={self.groups} does not divide rows={self.rows}: choose a divisor, or None")

    def init(self, n: int, spec: Spec) -> NWSState:
        """An empty sketch; with an array of features, the codes of all examples.

        Raises:
            ConfigError: no features, or not `n` of them.
        """
        if spec.features is None:
            raise ConfigError("NWS tells examples apart by their features: give Spec(features=...), [n, dim]")
        given = None if callable(spec.features) else jnp.asarray(spec.features)
        if given is not None and (given.ndim != 2 or given.shape[0] != n):
            raise ConfigError(f"features {list(given.shape)} for n={n}: must be [n, dim]; flatten images")
        position = Position.make(n, seed=spec.seed)
        probed = jnp.arange(min(n, _PROBED)) * (n // min(n, _PROBED))
        some = spec.features(probed) if callable(spec.features) else spec.features[probed]
        middle = some.astype(jnp.float32).mean(0)
        lsh = SignProjections.make(jax.random.key(spec.seed), dim=middle.shape[0], rows=self.rows, hashes=self.hashes)
        codes = None
        if given is not None:
            pieces = [hashed(lsh, middle, given[i : i + _CODED]) for i in range(0, n, _CODED)]
            codes = jnp.concatenate(pieces).astype(jnp.uint8 if self.hashes <= 8 else jnp.uint16)
        return NWSState(
            position=position,
            steps=jnp.zeros((), jnp.int32),
            sketch=NWSketch.make(rows=self.rows, cells=lsh.buckets),
            lsh=lsh,
            middle=middle,
            codes=codes,
            features=spec.features if callable(spec.features) else None,
        )

    def estimates(self, state: NWSState, ids: Int32[Array, " m"]) -> Float[Array, " m"]:
        """The losses that the sketch expects of these examples."""
        return state.sketch.query(_codes(state, ids), groups=self.groups)

    def draw(self, state: NWSState, key: Key[Array, ""], batch: int) -> Draw:
        """`batch` of the next `pool * batch` candidates (of all, where those are fewer)."""
        candidates = state.position.take(self._pool(state, batch))
        scores = jnp.where(state.steps < self.warmup, 1.0, self.estimates(state, candidates))
        probabilities = inclusion_probabilities(scores, batch, uniform=self.uniform)
        index, weights = systematic(key, probabilities, batch)
        return candidates[index], weights if self.weighted else jnp.ones(batch)

    def update(self, state: NWSState, ids: Int32[Array, " batch"], losses: Float[Array, " batch"]) -> NWSState:
        """Behind the pool, with the losses of the batch in the sketch."""
        sketch = state.sketch.forget(self.decay).insert(_codes(state, ids), losses)
        position = state.position.advance(self._pool(state, ids.shape[0]))
        return dataclasses.replace(state, position=position, steps=state.steps + 1, sketch=sketch)

    def _pool(self, state: NWSState, batch: int) -> int:
        return min(self.pool * batch, state.position.n)


@jax.jit
def hashed(lsh: SignProjections, middle: Float[Array, " dim"], x: Float[Array, "m dim"]) -> Int32[Array, "m rows"]:
    """Codes of centred features: where all features are positive, all angles are small and everything collides."""
    return lsh(x.astype(jnp.float32) - middle)


def _codes(state: NWSState, ids: jax.Array) -> jax.Array:
    if state.features is not None:
        return hashed(state.lsh, state.middle, state.features(ids))
    assert state.codes is not None
    return state.codes[ids].astype(jnp.int32)
