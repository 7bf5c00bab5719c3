"""The cells of a Representer Sketch fitted to the network, once its hash functions are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.sketch.representer import RepresenterSketch

_ROWS_AT_ONCE = 4096  # of inputs that are projected and hashed together


def refit_sketch(
    sketch: RepresenterSketch,
    x: Float[Array, "batch in"],
    targets: Float[Array, "batch outputs"],
    *,
    steps: int,
) -> RepresenterSketch:
    """Moves the counts to where the sketch itself, not the kernel that it estimates, answers as the network does.

    With the hash functions fixed a query is linear in the counts: each row adds one of its cells. So they are fitted
    by least squares, with conjugate gradients that begin at the counts of the kernel. Few steps keep what the data does
    not tell, as a ridge would; choose their number on held-out inputs. Size and cost of the sketch stay the same. Its
    counts are no kernel sum any more: do not add points to `sketch.race` after this.

    Args:
        sketch: from `effjax.sketch.build_sketch`.
        x: inputs; noise may have been added to them, and an input may stand there several times.
        targets: the network's outputs for them, clipped as for `distillation_loss`.
        steps: of conjugate gradients; each reads and writes a cell a row and input. 0 returns the sketch as it is.

    Raises:
        ValueError: fewer than 0 steps, inputs of another width, or targets that are not one row an input.

    Example:
        >>> from effjax.sketch.representer import build_sketch, query_sketch
        >>> from effjax.sketch.representer_kernel import init_representer
        >>> x = jax.random.normal(jax.random.key(0), (500, 10))
        >>> wanted = jnp.tanh(x[:, :1])
        >>> kernel = init_representer(jax.random.key(1), x, outputs=1, dim=4, points=50)
        >>> sketch = build_sketch(kernel, rows=100, buckets=8, key=jax.random.key(2))
        >>> fitted = refit_sketch(sketch, x, wanted, steps=10)
        >>> before, after = (jnp.square(query_sketch(s, x) - wanted).mean() for s in (sketch, fitted))
        >>> bool(after < before / 2), fitted.nbytes == sketch.nbytes
        (True, True)
    """
    rows, buckets, outputs = sketch.counts.shape
    if steps < 0:
        raise ValueError(f"steps={steps}: 0 or more")
    if x.ndim != 2 or x.shape[1] != sketch.projection.shape[0]:
        raise ValueError(f"inputs of shape {x.shape}: the sketch takes (batch, {sketch.projection.shape[0]})")
    if targets.shape != (x.shape[0], outputs):
        raise ValueError(f"targets of shape {targets.shape}: the sketch gives ({x.shape[0]}, {outputs}) for them")
    lsh = sketch.hash_functions()
    codes = jax.lax.map(lambda row: lsh(row @ sketch.projection), x, batch_size=_ROWS_AT_ONCE)
    every_row = jnp.arange(rows)

    def read(counts: jax.Array) -> jax.Array:
        return counts[every_row, codes].mean(1)

    _, back = jax.vjp(read, sketch.counts)
    # What is asked of the mean over the rows, before rehashing is taken out and the bias added.
    wanted = (targets - sketch.bias) * (1 - 1 / buckets) + sketch.total / buckets
    rest = wanted - read(sketch.counts)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a * b).sum((0, 1))

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    def step(state: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], None]:
        counts, rest, way, size = state
        moved = read(way)
        length = ratio(size, jnp.square(moved).sum(0))
        rest = rest - length * moved
        (slope,) = back(rest)
        now = dot(slope, slope)
        return (counts + length * way, rest, slope + ratio(now, size) * way, now), None

    (slope,) = back(rest)
    (counts, *_), _ = jax.lax.scan(step, (sketch.counts, rest, slope, dot(slope, slope)), length=steps)
    return dataclasses.replace(sketch, counts=counts)
