"""Representer Sketch: inference as hashing into arrays of counts."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from effjax.hashing.lsh import Projections, PStable, SignProjections
from effjax.hashing.race import Race, corrected
from effjax.ops.representer import representer_query
from effjax.sketch.representer_kernel import Kind, RepresenterKernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RepresenterSketch:
    """A network as counts (Liu et al., "Efficient Inference via Universal LSH Kernel", 2021): nothing else is stored.

    Attributes:
        projection: `float32[in, dim]`.
        counts: `float32[rows, buckets, outputs]`; outputs share their hashes.
        total: `float32[outputs]`, the sum of all weights, for the correction of rehashing.
        bias: `float32[outputs]`.
        seed: `uint32[2]`, from which the hash functions are drawn again.
        kind, width, hashes: of the kernel.
        projections: "gaussian", or "sparse" for directions of -1, 0, +1.
    """

    projection: Shaped[Array, "in dim"]
    counts: Shaped[Array, "rows buckets outputs"]
    total: Shaped[Array, " outputs"]
    bias: Shaped[Array, " outputs"]
    seed: Shaped[Array, "2"]
    kind: Kind = dataclasses.field(metadata={"static": True})
    width: float = dataclasses.field(metadata={"static": True})
    hashes: int = dataclasses.field(metadata={"static": True})
    projections: Projections = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of every stored array; hash functions are drawn from the seed, see `working_bytes`."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def working_bytes(self) -> int:
        """Bytes that queries read: what is stored, and the hash functions drawn from the seed."""
        drawn = jax.tree.leaves(jax.eval_shape(RepresenterSketch.hash_functions, self))
        return self.nbytes + sum(x.size * x.dtype.itemsize for x in drawn)

    def hash_functions(self) -> PStable | SignProjections:
        """The hash functions, drawn from the seed: the same ones in every process."""
        key = jax.random.wrap_key_data(self.seed, impl="threefry2x32")
        rows, buckets = self.counts.shape[:2]
        return _draw(key, self.projection.shape[1], rows, buckets, self.kind, self.width, self.hashes, self.projections)

    @property
    def race(self) -> Race:
        """The counts as a sketch of a kernel sum, to which points can be added."""
        return Race(counts=self.counts, total=self.total)


def _draw(
    key: jax.Array, dim: int, rows: int, buckets: int, kind: Kind, width: float, hashes: int, projections: Projections
) -> PStable | SignProjections:
    if kind == "angular":
        return SignProjections.make(key, dim=dim, rows=rows, hashes=hashes, buckets=buckets, projections=projections)
    return PStable.make(key, dim=dim, rows=rows, hashes=hashes, width=width, buckets=buckets, projections=projections)


def build_sketch(
    kernel: RepresenterKernel,
    *,
    rows: int,
    buckets: int,
    key: jax.Array,
    projections: Projections = "gaussian",
) -> RepresenterSketch:
    """Hashes every representer once and adds its weights to the cells; then representers are not needed any more.

    Args:
        kernel: as trained.
        rows: repetitions; the error of a query falls with their root.
        buckets: cells of a row, at least 2.
        key: for the seed of the hash functions.
        projections: "sparse" hashes with a third of the additions; its kernel is that of `kernel` only roughly where
            `dim` is small.

    Raises:
        ValueError: no row, fewer than 2 buckets, or unknown projections.

    Example:
        >>> from effjax.sketch.representer_kernel import init_representer
        >>> x = jax.random.normal(jax.random.key(0), (100, 20))
        >>> kernel = init_representer(jax.random.key(1), x, outputs=1, dim=4, points=50)
        >>> sketch = build_sketch(kernel, rows=400, buckets=16, key=jax.random.key(2))
        >>> sketch.nbytes == 4 * (20 * 4 + 400 * 16 + 1 + 1 + 2)
        True
        >>> error = query_sketch(sketch, x) - kernel(x)
        >>> bool(jnp.abs(error).mean() < 0.5 * jnp.std(kernel(x)))
        True
    """
    empty = Race.make(rows=rows, buckets=buckets, outputs=kernel.alpha.shape[1:])
    seed = jax.random.bits(key, (2,), jnp.uint32)
    sketch = RepresenterSketch(
        projection=kernel.projection.astype(jnp.float32),
        counts=empty.counts,
        total=empty.total,
        bias=kernel.bias.astype(jnp.float32),
        seed=seed,
        kind=kernel.kind,
        width=kernel.width,
        hashes=kernel.hashes,
        projections=projections,
    )
    race = empty.add(sketch.hash_functions()(kernel.points), kernel.alpha.astype(jnp.float32))
    return dataclasses.replace(sketch, counts=race.counts, total=race.total)


def query_sketch(
    sketch: RepresenterSketch,
    x: Float[Array, "*batch in"],
    *,
    hash_functions: PStable | SignProjections | None = None,
    groups: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch outputs"]:
    """The network's outputs, from a few hashes and look-ups a row.

    Args:
        sketch: from `build_sketch`.
        x: inputs, as the network takes them.
        hash_functions: `sketch.hash_functions()`, made once for many calls; None draws them in this one.
        groups: the median of the means of so many groups of rows; None for the mean of all.
        implementation: as in `effjax.ops.representer_query`.

    Raises:
        ValueError: `groups` does not divide the rows, inputs of another width, or an implementation that does not run.
    """
    lsh = sketch.hash_functions() if hash_functions is None else hash_functions
    mean = representer_query(x, sketch.projection, lsh, sketch.counts, groups=groups, implementation=implementation)
    return corrected(mean, sketch.total, sketch.counts.shape[1]) + sketch.bias
