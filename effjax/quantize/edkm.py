"""eDKM: differentiable k-means from the table of distinct 16-bit values, with an exact gradient of its own."""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt16

from effjax.errors import LeafError
from effjax.quantize.checks import check_choice
from effjax.quantize.dkm import DEAD, DKM

Path = Literal["auto", "histogram", "sort", "direct"]

BINS = 1 << 16  # what 16 bits can spell
BLOCK = 128  # bins that are visited or skipped together: the mantissas of one bfloat16 exponent
TERMS = 1 << 14  # entries of a tile of responsibilities: what is worked on fits the cache
SLICE = 1 << 16  # weights that are counted at a time
FEW = 1 << 12  # weights below which a table does not pay


class Table(NamedTuple):
    """Distinct 16-bit values in blocks of rows, of which only the occupied ones are visited.

    Attributes:
        patterns: the bits of every row's value; None where row `i` is pattern `i`.
        counts: how many weights have the value; zero marks a row that is not there.
        order: the occupied blocks first; padded with the number of blocks.
        occupied: how many they are.
    """

    patterns: UInt16[Array, "blocks rows"] | None
    counts: Float[Array, "blocks rows"]
    order: Int[Array, " blocks"]
    occupied: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDKM(DKM):
    """Differentiable k-means that never forms the map of weights times clusters.

    The same soft weights and gradients as `DKM` on weights rounded to 16 bits, computed on the table of their distinct
    values, of which 16 bits leave at most 65 536. The backward pass keeps two bytes a weight and a few centroids.
    Rounding is passed straight through to float32 master weights. Source: eDKM, Cho et al. 2023, sections 2.1 to 2.3;
    the marshaling of that paper has nothing to do in JAX, where a residual is stored once.

    Attributes:
        bits, tau, relative, iterations, group_columns: as in `DKM`.
        round_to: "bfloat16" or "float16"; weights of these dtypes are taken as they are.
        path: how distinct values are found, see `edkm_soft`.
        axis: axis of the mesh in context over whose devices the index of the backward pass is spread, or None.
        replicated: whether every device along `axis` holds the whole weight (data parallel) or a shard of it.

    Example:
        >>> import jax, jax.numpy as jnp, effjax as ej
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
        >>> method = EDKM(bits=2)
        >>> state = ej.quantize.init_clusters(params, method)
        >>> soft, state = ej.quantize.palettize(params, method, state)
        >>> soft["kernel"].shape, state["kernel"].centroids.shape
        ((64, 32), (1, 4))
    """

    round_to: str | None = "bfloat16"
    path: Path = "auto"
    axis: str | None = None
    replicated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to is None:
            raise ValueError("round_to=None: choose 'bfloat16' or 'float16' (DKM takes weights as they are)")
        check_choice(("auto", "histogram", "sort", "direct"), path=self.path)

    def soft(self, w: jax.Array, centroids: jax.Array, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        return edkm_soft(
            w,
            centroids,
            tau,
            self.iterations,
            round_to=self.round_to or "bfloat16",
            path=self.path,
            axis=self.axis,
            replicated=self.replicated,
        )


@dataclasses.dataclass(frozen=True)
class _How:
    """What a program is compiled for."""

    iterations: int
    round_to: str
    path: Path
    axis: str | None
    replicated: bool
    dtype: Any  # of the weights


def edkm_soft(
    w: Float[Array, "*S"],
    centroids: Float[Array, " K"],
    tau: Any,
    iterations: int = 3,
    *,
    round_to: str = "bfloat16",
    path: Path = "auto",
    axis: str | None = None,
    replicated: bool = True,
) -> tuple[Float[Array, "*S"], Float[Array, " K"]]:
    """`dkm_soft` of weights rounded to 16 bits: equal values and gradients, from a table of the distinct values.

    Gradients with respect to weights, centroids and `tau` are exact but for the order of sums (the rounding itself is
    passed straight through). Kept for the backward pass: two bytes a weight, and `iterations + 1` sets of centroids.
    Works under `jit`, `vmap`, `scan` and `jax.checkpoint`; forward mode (`jvp`) is not defined.

    Args:
        w: weights of one table, any shape; float32, bfloat16 or float16.
        centroids: where the iterations start.
        tau: temperature, in units of squared weights.
        iterations: at least 1.
        round_to: dtype that wider weights are rounded to.
        path: "histogram" counts all 65 536 bit patterns, "sort" finds the distinct ones by sorting, "direct" takes
            every weight as a row of its own, tile by tile; "auto" is "direct" below 4096 weights, else "histogram".
            With `axis` it is always "histogram".
        axis: mesh axis over which the kept index is spread; the mesh is that of `jax.set_mesh`.
        replicated: with `axis`, whether each device holds all of `w`; if not, the first dimension of `w` is cut over
            `axis`, and the result and the gradient are cut likewise.

    Returns:
        Soft weights of the shape and dtype of `w`, and the updated centroids (float32).

    Raises:
        LeafError: an unknown dtype, or a weight that its devices cannot share evenly.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.array([-1.0, -0.9, 0.9, 1.0])
        >>> soft, centroids = edkm_soft(w, jnp.array([-0.5, 0.5]), 1e-2)
        >>> [round(c, 2) for c in centroids.tolist()]
        [-0.95, 0.95]
    """
    if jnp.dtype(round_to) not in (jnp.bfloat16, jnp.float16):
        raise LeafError(f"round_to={round_to!r}: 16-bit floating dtypes are 'bfloat16' and 'float16'")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise LeafError(f"weights of {w.dtype}: clusters are of floating weights")
    if iterations < 1:
        raise LeafError(f"iterations={iterations}: at least one")
    short = w.dtype in (jnp.bfloat16, jnp.float16)
    if path == "auto" and axis is None:
        path = "direct" if w.size < FEW else "histogram"
    if axis is not None:
        path = "histogram"  # counts of bit patterns add up over devices
        devices = _devices(axis)
        if not replicated and (w.ndim == 0 or w.shape[0] % devices):
            raise LeafError(f"a weight {list(w.shape)} cannot be cut over {devices} devices: pass replicated=True")
    how = _How(iterations, w.dtype.name if short else jnp.dtype(round_to).name, path, axis, replicated, w.dtype)
    return _soft(how, w, jnp.asarray(centroids, jnp.float32), jnp.asarray(tau, jnp.float32))


def bit_patterns(w: Float[Array, "*S"], round_to: str = "bfloat16") -> UInt16[Array, "*S"]:
    """The bits of weights rounded to a 16-bit dtype, ties to even."""
    if w.dtype == jnp.float32 and round_to == "bfloat16":
        # The upper half of a float32; through a bfloat16 array the compiler would store a second copy of the weights.
        rounded = lax.bitcast_convert_type(lax.reduce_precision(w, 8, 7), jnp.uint32)
        return (rounded >> 16).astype(jnp.uint16)
    return lax.bitcast_convert_type(w.astype(round_to), jnp.uint16)


def values_of(patterns: UInt16[Array, "*S"], dtype: str = "bfloat16") -> Float[Array, "*S"]:
    """The float32 values that 16-bit patterns stand for.

    Example:
        >>> values_of(bit_patterns(jnp.array([0.5, -2.0]))).tolist()
        [0.5, -2.0]
    """
    if dtype == "bfloat16":
        return lax.bitcast_convert_type(patterns.astype(jnp.uint32) << 16, jnp.float32)
    return lax.bitcast_convert_type(patterns, jnp.dtype(dtype)).astype(jnp.float32)


def uniquify(
    w: Float[Array, " N"], *, round_to: str = "bfloat16", path: Path = "histogram"
) -> tuple[Table, UInt16[Array, " N"]]:
    """The table of distinct values of rounded weights, and for each weight the row of its value.

    Example:
        >>> table, index = uniquify(jnp.array([1.0, -0.5, 1.0]), path="sort")
        >>> values_of(table.patterns.ravel()[index]).tolist(), table.counts.ravel()[:2].tolist()
        ([1.0, -0.5, 1.0], [2.0, 1.0])
    """
    patterns = bit_patterns(w, round_to)
    if path == "histogram":
        return histogram_table(count_patterns(w, round_to)), patterns
    return _table_of(patterns, path)


def count_patterns(w: Float[Array, " N"], round_to: str = "bfloat16") -> Float[Array, " 65536"]:
    """How often each bit pattern occurs among rounded weights."""
    return _in_slices(lambda part: (bit_patterns(part, round_to), jnp.ones(part.size)), w)


def _in_slices(entries: Any, *arrays: jax.Array) -> Float[Array, " 65536"]:
    """Sums over bins; `entries(*slices)` gives those of a slice, so that nothing else gets as long as the arrays."""

    def add(sums: jax.Array, slices: list[jax.Array]) -> jax.Array:
        index, values = entries(*slices)
        return _add_at(sums, index, values)

    def step(i: jax.Array, sums: jax.Array) -> jax.Array:
        return add(sums, [lax.dynamic_slice(x, (i * SLICE,), (SLICE,)) for x in arrays])

    whole = arrays[0].size // SLICE
    sums = lax.fori_loop(0, whole, step, jnp.zeros(BINS)) if whole else jnp.zeros(BINS)
    rest = [x[whole * SLICE :] for x in arrays]
    return add(sums, rest) if rest[0].size else sums


def histogram_table(counts: Float[Array, " 65536"]) -> Table:
    """The table whose rows are all bit patterns."""
    counts = counts.reshape(-1, BLOCK)
    blocks = counts.shape[0]
    filled = (counts > 0).any(1)
    order = jnp.nonzero(filled, size=blocks, fill_value=blocks)[0].astype(jnp.int32)
    return Table(None, counts, order, filled.sum(dtype=jnp.int32))


def _table_of(patterns: UInt16[Array, " N"], path: Path) -> tuple[Table, jax.Array]:
    """The table without a histogram, from the patterns of all weights."""
    counts, index = jnp.ones(patterns.shape), lax.iota(jnp.int32, patterns.size)
    if path == "sort":
        patterns, index, found = jnp.unique(
            patterns, return_inverse=True, return_counts=True, size=min(patterns.size, BINS)
        )
        counts, index = found.astype(jnp.float32), index.astype(jnp.uint16)
    pad = -patterns.size % BLOCK
    blocks = (patterns.size + pad) // BLOCK
    rows = [jnp.pad(x, (0, pad)).reshape(-1, BLOCK) for x in (patterns, counts)]
    return Table(rows[0], rows[1], lax.iota(jnp.int32, blocks), jnp.int32(blocks)), index


def _over_tiles(table: Table, dtype: str, clusters: int, body: Any, carry: Any) -> Any:
    """`carry = body(carry, blocks, values, counts)` for tiles of the occupied rows; values and counts are flat."""
    blocks = table.counts.shape[0]
    tile = min(blocks, max(1, TERMS // (clusters * BLOCK)))
    order = jnp.pad(table.order, (0, -blocks % tile), constant_values=blocks)

    def step(i: jax.Array, carry: Any) -> Any:
        at = lax.dynamic_slice(order, (i * tile,), (tile,))
        if table.patterns is None:
            # A block beyond the last would spell infinities; its counts are zero, and any finite value will do.
            patterns = (jnp.where(at < blocks, at, 0)[:, None] * BLOCK + jnp.arange(BLOCK)).reshape(-1)
        else:
            patterns = _rows(table.patterns, at)
        return body(carry, at, values_of(patterns.astype(jnp.uint16), dtype), _rows(table.counts, at))

    return lax.fori_loop(0, (table.occupied + tile - 1) // tile, step, carry)


def responsibilities(u: Float[Array, " N"], c: Float[Array, " K"], tau: Any) -> Float[Array, "K N"]:
    """Share of every centroid in every value; rows run along the last axis, where the processor's lanes are."""
    return jax.nn.softmax(-jnp.square(u - c[:, None]) / tau, axis=0)


def _rows(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """The rows of some blocks; zeros for blocks beyond the last."""
    return x.at[blocks].get(mode="fill", fill_value=0).reshape(-1)


def _put(x: jax.Array, blocks: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows of some blocks, leaving out blocks beyond the last."""
    return x.at[blocks].set(rows.reshape(-1, BLOCK), mode="drop")


def _iterate(table: Table, dtype: str, c: jax.Array, tau: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Centroids before and after each iteration `[iterations + 1, K]`, and what each gathered `[iterations, K]`."""

    def update(c: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def add(sums: Any, _: jax.Array, u: jax.Array, n: jax.Array) -> Any:
            share = responsibilities(u, c, tau) * n
            return sums[0] + (share * u).sum(-1), sums[1] + share.sum(-1)

        total, mass = _over_tiles(table, dtype, c.size, add, (jnp.zeros_like(c), jnp.zeros_like(c)))
        new = jnp.where(mass > DEAD, total / jnp.where(mass > DEAD, mass, 1), c)
        return new, (new, mass)

    _, (after, masses) = lax.scan(update, c, None, length=iterations)
    return jnp.concatenate([c[None], after]), masses


def _read_out(table: Table, dtype: str, centroids: jax.Array, tau: jax.Array) -> jax.Array:
    """The soft value of every occupied row."""

    def write(t: jax.Array, at: jax.Array, u: jax.Array, _: jax.Array) -> jax.Array:
        return _put(t, at, (responsibilities(u, centroids[-2], tau) * centroids[-1][:, None]).sum(-2))

    return _over_tiles(table, dtype, centroids.shape[1], write, jnp.zeros(table.counts.shape))


def _pull_back(
    table: Table,
    dtype: str,
    centroids: jax.Array,
    masses: jax.Array,
    tau: jax.Array,
    g: jax.Array,
    g_centroids: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The transpose of `_iterate` and `_read_out`.

    A weight acts in two ways: on its own soft value, at fixed centroids, and on the centroids of every iteration.
    The first is a slope a distinct value, to be multiplied with the weight's own cotangent; the second is the same
    number for all weights of a value, so that it is derived for one of them, not for their sum.

    Args:
        g: sum of the cotangents of all weights of a row, `[blocks, rows]`.
        g_centroids: cotangent of the last centroids.

    Returns:
        Slope at fixed centroids and gradient through the centroids, `[blocks, rows]` each; gradients of the first
        centroids and of tau.
    """
    before, last = centroids[-2], centroids[-1]
    clusters = last.size
    zeros, none = jnp.zeros(table.counts.shape), jnp.zeros_like(last)

    def read(carry: Any, at: jax.Array, u: jax.Array, _: jax.Array) -> Any:
        slope, g_before, g_last, g_tau = carry
        a, off = responsibilities(u, before, tau), u - before[:, None]
        moved = a * (last[:, None] - (a * last[:, None]).sum(-2)) * off  # d soft / d logit, times the distance
        own = _rows(g, at)
        return (
            _put(slope, at, -2 / tau * moved.sum(-2)),
            g_before + 2 / tau * (moved * own).sum(-1),
            g_last + (a * own).sum(-1),
            g_tau + (moved * off * own).sum() / tau**2,
        )

    slope, g_before, g_last, g_tau = _over_tiles(table, dtype, clusters, read, (zeros, none, none, jnp.zeros(())))

    def step(carry: Any, now: Any) -> Any:
        through, g_new, g_tau = carry
        c, new, mass, extra = now
        alive = mass > DEAD
        pull = jnp.where(alive, g_new / jnp.where(alive, mass, 1), 0)[:, None]

        def back(carry: Any, at: jax.Array, u: jax.Array, n: jax.Array) -> Any:
            through, g_c, g_tau = carry
            a, off = responsibilities(u, c, tau), u - c[:, None]
            gain = pull * (u - new[:, None])
            moved = a * (gain - (a * gain).sum(-2)) * off
            own = _rows(through, at) + (a * pull).sum(-2) - 2 / tau * moved.sum(-2)
            g_c = g_c + 2 / tau * (moved * n).sum(-1)
            return _put(through, at, own), g_c, g_tau + (moved * off * n).sum() / tau**2

        start = (through, jnp.where(alive, 0, g_new) + extra, g_tau)
        return _over_tiles(table, dtype, clusters, back, start), None

    extras = jnp.zeros_like(masses).at[-1].set(g_before)
    start = (zeros, g_last + g_centroids, g_tau)
    steps = (centroids[:-1], centroids[1:], masses, extras)
    (through, g_first, g_tau), _ = lax.scan(step, start, steps, reverse=True)
    return slope, through, g_first, g_tau


def _add_at(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """`x.at[index].add(values)` without a wider copy of the index."""
    numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
    return lax.scatter_add(x, index[:, None], values, numbers, mode="promise_in_bounds")


def _look_up(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _soft(how: _How, w: jax.Array, c: jax.Array, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(how, w, c, tau)[0]


def _forward(how: _How, w: jax.Array, c: jax.Array, tau: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
    if how.axis is None:
        soft, centroids, masses, bits = _forward_here(how, w, c, tau)
    else:
        whole = P() if how.replicated else P(how.axis)
        soft, centroids, masses, bits = jax.shard_map(
            partial(_forward_here, how),
            in_specs=(whole, P(), P()),
            out_specs=(whole, P(), P(), P(how.axis)),
            axis_names={how.axis},
            check_vma=False,
        )(w, c, tau)
    return (soft, centroids[-1]), (bits, centroids, masses, tau)


def _backward(how: _How, kept: Any, g: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    bits, centroids, masses, tau = kept
    if how.axis is None:
        return _backward_here(how, bits, centroids, masses, tau, g[0], g[1])
    whole = P() if how.replicated else P(how.axis)
    return jax.shard_map(
        partial(_backward_here, how),
        in_specs=(P(how.axis), P(), P(), P(), whole, P()),
        out_specs=(whole, P(), P()),
        axis_names={how.axis},
        check_vma=False,
    )(bits, centroids, masses, tau, g[0], g[1])


_soft.defvjp(_forward, _backward)


def _forward_here(
    how: _How, w: jax.Array, c: jax.Array, tau: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Soft weights, all centroids, their masses, and the bit patterns to keep, of what this device holds."""
    flat = w.reshape(-1)
    mine, pad = _my_share(how, flat)
    kept = bit_patterns(mine, how.round_to)
    table, index = _table(how, lambda: count_patterns(mine, how.round_to), kept, pad)
    centroids, masses = _iterate(table, how.round_to, c, tau, how.iterations)
    t = _read_out(table, how.round_to, centroids, tau).reshape(-1).astype(how.dtype)
    if how.path == "direct":
        soft = t[: w.size]
    else:
        soft = _look_up(t, bit_patterns(flat, how.round_to) if _spread_out(how) else index)
    return soft.reshape(w.shape), centroids, masses, kept


def _backward_here(
    how: _How,
    kept: jax.Array,
    centroids: jax.Array,
    masses: jax.Array,
    tau: jax.Array,
    g: jax.Array,
    g_centroids: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape, g = g.shape, g.reshape(-1).astype(jnp.float32)
    g_mine, pad = _my_share(how, g)
    table, index = _table(how, lambda: _in_slices(lambda part: (part, jnp.ones(part.size)), kept), kept, pad)
    if how.path == "direct":
        sums = jnp.pad(g_mine, (0, table.counts.size - g_mine.size))
    elif how.path == "histogram":
        sums = _in_slices(lambda *entries: entries, kept, g_mine)
    else:
        sums = _add_at(jnp.zeros(table.counts.size), index, g_mine)
    sums = sums if how.axis is None else lax.psum(sums, how.axis)
    slope, through, g_first, g_tau = _pull_back(
        table, how.round_to, centroids, masses, tau, sums.reshape(table.counts.shape), g_centroids
    )
    slope, through = slope.reshape(-1), through.reshape(-1)
    if how.path == "direct":
        g_w = g * slope[: g.size] + through[: g.size]
    else:
        if _spread_out(how):
            index = lax.all_gather(kept, how.axis, tiled=True)[: g.size]
        g_w = g * _look_up(slope, index) + _look_up(through, index)
    return g_w.reshape(shape).astype(how.dtype), g_first, g_tau


def _spread_out(how: _How) -> bool:
    """Whether each device holds all weights but keeps the patterns of its share only."""
    return how.axis is not None and how.replicated


def _table(how: _How, count: Any, patterns: jax.Array, pad: int) -> tuple[Table, jax.Array]:
    """The table of the weights of all devices, and the rows of those of this one."""
    if how.path != "histogram":
        return _table_of(patterns, how.path)
    counts = count()
    if how.axis is not None:
        counts = lax.psum(counts, how.axis).at[0].add(-pad)  # padding counts as zeros
    return histogram_table(counts), patterns


def _my_share(how: _How, x: jax.Array) -> tuple[jax.Array, int]:
    """The part of a flat array that this device keeps, and the zeros at the end of the last."""
    if how.axis is None or not how.replicated:
        return x, 0
    devices = _devices(how.axis)
    share = -(-x.size // devices)
    pad = share * devices - x.size
    return lax.dynamic_slice(jnp.pad(x, (0, pad)), (lax.axis_index(how.axis) * share,), (share,)), pad


def _devices(axis: str) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.shape:
        raise LeafError(f"axis={axis!r} is none of the mesh in context ({dict(mesh.shape)}): use jax.set_mesh")
    return mesh.shape[axis]
