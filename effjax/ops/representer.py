"""A query of a Representer Sketch: project, hash, look up, aggregate; natively on the CPU in one call."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.hashing.integers import MultiplyShift
from effjax.hashing.lsh import PStable, SignProjections
from effjax.hashing.race import check_groups
from effjax.ops.platform import platform_operation
from kernels_cpu import representer as native

_STATIC = ("signs", "groups")


def representer_query(
    x: Float[Array, "*batch in"],
    projection: Float[Array, "in dim"],
    hash_functions: PStable | SignProjections,
    counts: Float[Array, "rows buckets outputs"],
    *,
    groups: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch outputs"]:
    """`mean_l counts[l, h_l(x A)]`, or the median of the means of `groups` groups of rows.

    Derivatives are those of the looked-up counts; hashing has none.

    Args:
        x: inputs; computed in float32.
        projection: `A`.
        hash_functions: with rehashing, `rows` of them to `buckets` cells.
        counts: of a `effjax.hashing.race.Race`.
        groups: divides the rows.
        implementation: "reference" or "cpu"; None takes the native kernel in a jitted program for one CPU, else the
            reference. A code that lies within rounding of a boundary may differ between the two.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that does not run here.

    Example:
        >>> lsh = PStable.make(jax.random.key(0), dim=2, rows=6, hashes=1, width=1.0, buckets=4)
        >>> representer_query(jnp.ones((5, 3)), jnp.ones((3, 2)), lsh, jnp.ones((6, 4, 2))).shape
        (5, 2)
    """
    dim, hashes, rows = hash_functions.directions.shape
    if hash_functions.rehash is None:
        raise ValueError("representer_query: hash_functions must rehash; give SignProjections.make a number of buckets")
    wanted = (rows, hash_functions.buckets)
    if x.shape[-1:] != projection.shape[:1] or projection.shape[1] != dim or counts.shape[:2] != wanted:
        raise ValueError(
            f"representer_query: x {x.shape}, projection {projection.shape} and counts {counts.shape} do not fit "
            f"hashes of {dim} channels to {rows} rows of {hash_functions.buckets} buckets"
        )
    check_groups(1 if groups is None else groups, rows)
    signs = isinstance(hash_functions, SignProjections)
    offsets = jnp.zeros((hashes, rows)) if signs else hash_functions.offsets
    rehash = hash_functions.rehash
    batch = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    arrays = (flat, projection, hash_functions.directions, offsets, rehash.multiplier, rehash.addend, counts)
    y: Any = _query(signs, groups or 1, implementation, *arrays)
    return y.reshape(*batch, counts.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _query(signs: bool, groups: int, implementation: str | None, *arrays: jax.Array) -> jax.Array:
    if implementation is None:
        return _chosen(*arrays, signs=signs, groups=groups)
    if implementation == "reference":
        return _reference(*arrays, signs=signs, groups=groups)
    if implementation != "cpu":
        raise ValueError(f"representer_query: implementation={implementation!r}: choose 'reference' or 'cpu'")
    reason = native.why_not(arrays[1].shape[1])
    if reason:
        raise ValueError(f"representer_query: implementation='cpu' does not run: {reason}")
    return _native(*arrays, signs=signs, groups=groups)


def _forward(signs: bool, groups: int, implementation: str | None, *arrays: jax.Array) -> tuple[jax.Array, tuple]:
    return _query(signs, groups, implementation, *arrays), arrays


def _backward(signs: bool, groups: int, implementation: str | None, arrays: tuple, g: jax.Array) -> tuple:
    def reference(counts: jax.Array) -> jax.Array:
        return _reference(*arrays[:-1], counts, signs=signs, groups=groups)

    return (*(None for _ in arrays[:-1]), *jax.vjp(reference, arrays[-1])[1](g))


_query.defvjp(_forward, _backward)


def _reference(*arrays: jax.Array, signs: bool, groups: int) -> jax.Array:
    x, projection, directions, offsets, multiplier, addend, counts = arrays
    rehash = MultiplyShift(multiplier=multiplier, addend=addend)
    rows, buckets, outputs = counts.shape
    if signs:
        lsh = SignProjections(directions=directions, rehash=rehash, buckets=buckets)
    else:
        lsh = PStable(directions=directions, offsets=offsets, rehash=rehash, width=1.0, buckets=buckets)
    hit = counts.astype(jnp.float32)[jnp.arange(rows), lsh(x @ projection.astype(jnp.float32))]
    return _median(hit.reshape(-1, groups, rows // groups, outputs).mean(-2))


def _native(*arrays: jax.Array, signs: bool, groups: int) -> jax.Array:
    return _median(native.group_means(*arrays, signs=signs, groups=groups))


def _median(means: jax.Array) -> jax.Array:
    return means[:, 0] if means.shape[1] == 1 else jnp.median(means, axis=1)


def _where_native(*arrays: jax.Array, signs: bool, groups: int) -> jax.Array:
    run = _reference if native.why_not(arrays[1].shape[1]) else _native
    return run(*arrays, signs=signs, groups=groups)


_chosen = platform_operation(
    "representer_query",
    lambda x, projection, directions, offsets, multiplier, addend, counts, **_: (
        (x.shape[0], counts.shape[-1]),
        jnp.dtype(jnp.float32),
    ),
    default=_reference,
    one_device={"cpu": _where_native},
    static_argnames=_STATIC,
)
