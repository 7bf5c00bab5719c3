"""Compressed arrays on a mesh of eight devices, automatic and explicit: cut as asked, same result as on one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax.arrays.base import full_spec
from tests.common.cases import (
    ARRAYS,
    STACKED,
    ArrayCase,
    assert_same_bytes,
    dense,
    example,
    inputs,
    mesh_of,
    multiply,
    place,
    spec_of,
)

modes = pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
CUTS = [pytest.param(case, dim, id=f"{case.name} {dim}") for case in ARRAYS for dim in case.sharded]
REFUSED = [
    pytest.param(case, dim, id=f"{case.name} {dim}")
    for case in ARRAYS
    for dim in range(-len(case.shape), 0)
    if dim not in case.sharded
]


def is_spec(x) -> bool:
    return isinstance(x, P)


def cut_fields(params, specs) -> list[tuple[jax.Array, list[int]]]:
    """Every field with the number of devices each of its dimensions is asked to be cut over."""
    fields, asked = jax.tree.leaves(params), jax.tree.leaves(specs, is_leaf=is_spec)
    return [
        (x, [4 if entry == "tensor" else 1 for entry in full_spec(spec, x.ndim)])
        for x, spec in zip(fields, asked, strict=True)
    ]


def largest_part(w):
    return max(w.parts, key=lambda part: part.nbytes) if isinstance(w, ej.arrays.Sum) else w


def check_placed(params, specs) -> None:
    for x, cuts in cut_fields(params, specs):
        shard = tuple(size // devices for size, devices in zip(x.shape, cuts, strict=True))
        assert {s.data.shape for s in x.addressable_shards} == {shard}
        assert len(x.sharding.device_set) == 8


def product(case: ArrayCase, x, w) -> np.ndarray:
    return np.einsum(case.einsum, np.asarray(x, np.float32), w)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@modes
@pytest.mark.parametrize(("case", "dim"), CUTS)
def test_sharded_product(case, dim, mode):
    """The largest field is really cut along the dimension, and the product is that of one device."""
    mesh = mesh_of(mode)
    params = {"w": example(case)}
    specs = ej.partition_specs(params, {"w": spec_of(len(case.shape), dim)}, mesh)
    largest, cuts = max(cut_fields(params, specs), key=lambda field: field[0].nbytes)
    if isinstance(largest_part(params["w"]), ej.arrays.LowRank):  # of two factors only one has the dimension
        assert sum(math.prod(cuts) == 4 for _, cuts in cut_fields(params, specs)) >= 1
    else:
        assert math.prod(cuts) == 4, f"{largest.shape} was not cut"
    with jax.set_mesh(mesh):
        sharded = place(params, specs, mesh)
        check_placed(sharded, specs)
        x = jax.device_put(inputs(case), NamedSharding(mesh, P("data", None)))
        y = jax.jit(ej.lift(multiply(case)))(sharded, x)
    assert_close(np.asarray(y), product(case, inputs(case), dense(case)))


@modes
@pytest.mark.parametrize("case", ARRAYS, ids=lambda case: case.name)
def test_sharded_layers(case, mode):
    """Stacked layers cut over devices, scanned inside a lifted function."""
    mesh = mesh_of(mode)
    params = {"w": example(case, (STACKED,))}
    specs = ej.partition_specs(params, {"w": P("tensor")}, mesh)
    assert all(cuts[0] == 4 and math.prod(cuts) == 4 for _, cuts in cut_fields(params, specs))
    f = multiply(case)
    with jax.set_mesh(mesh):
        sharded = place(params, specs, mesh)
        check_placed(sharded, specs)
        x = jax.device_put(inputs(case), NamedSharding(mesh, P("data", None)))
        y = jax.jit(jax.vmap(ej.lift(f), in_axes=(0, None)))(sharded, x)
    assert_close(np.asarray(y), np.stack([product(case, inputs(case), w) for w in dense(case, (STACKED,))]))


@pytest.mark.parametrize(("case", "dim"), REFUSED)
def test_refused_cut_is_replicated_in_every_field(case, dim):
    """Where bytes or groups would be cut, no field is."""
    params = {"w": example(case)}
    spec = {"w": spec_of(len(case.shape), dim)}
    specs = ej.partition_specs(params, spec, mesh_of(AxisType.Auto))
    assert all(math.prod(cuts) == 1 for _, cuts in cut_fields(params, specs))


@pytest.mark.parametrize(("case", "dim"), CUTS)
def test_every_shard_is_an_array(case, dim):
    """Inside shard_map a shard alone, without its neighbours, materialises to its part of the dense weight."""
    mesh = mesh_of(AxisType.Auto)
    w = example(case)
    dense_spec = spec_of(len(case.shape), dim)
    specs = ej.partition_specs({"w": w}, {"w": dense_spec}, mesh)["w"]
    parts = jax.jit(
        jax.shard_map(lambda w: w.materialize(), mesh=mesh, in_specs=(specs,), out_specs=dense_spec, check_vma=False)
    )(w)
    np.testing.assert_allclose(parts, dense(case), rtol=1e-6, atol=1e-6)


@modes
def test_gradient_of_sharded_fields(mode):
    """One representative a mode: the gradient of a cut scale equals that on one device."""
    case = next(case for case in ARRAYS if case.name == "q4 asymmetric g16")
    mesh = mesh_of(mode)
    trainable, frozen = ej.partition({"w": example(case)})

    def loss(trainable, frozen, x):
        return jnp.square(ej.lift(multiply(case))(ej.combine(trainable, frozen), x)).sum()

    want = jax.jit(jax.grad(loss))(trainable, frozen, inputs(case))
    specs = ej.partition_specs({"w": example(case)}, {"w": P(None, "tensor")}, mesh)
    with jax.set_mesh(mesh):
        sharded = ej.partition(place({"w": example(case)}, specs, mesh))
        x = jax.device_put(inputs(case), NamedSharding(mesh, P("data", None)))
        got = jax.jit(jax.grad(loss))(*sharded, x)
    assert got["w"].scales.sharding.spec == P(None, "tensor")
    np.testing.assert_allclose(
        np.asarray(got["w"].scales, np.float32), np.asarray(want["w"].scales, np.float32), rtol=2e-3
    )


def test_dense_leaves_and_missing_axes():
    """Dense leaves keep their spec unless the mesh does not divide them; no spec is replication."""
    mesh = mesh_of(AxisType.Auto)
    params = {"w": example(ARRAYS[1]), "bias": jnp.zeros(32), "odd": jnp.zeros(33), "free": jnp.zeros(3)}
    dense_specs = {"w": None, "bias": P("tensor"), "odd": P("tensor"), "free": None}
    specs = ej.partition_specs(params, dense_specs, mesh)
    assert (specs["bias"], specs["odd"], specs["free"]) == (P("tensor"), P(None), P(None))
    assert jax.tree.leaves(specs["w"], is_leaf=is_spec) == [P(None, None)] * 3
    placed = place(params, specs, mesh)
    assert_same_bytes(placed, params)
