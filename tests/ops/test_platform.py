"""Which implementation of a compressed product is lowered where, and that it batches like any operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kernels_cpu
from effjax.arrays import Quantized
from effjax.ops import matmul
from effjax.ops.dispatch import block_rows
from effjax.quantize import RTN


@pytest.fixture(scope="module")
def w() -> Quantized:
    return RTN(bits=4, group_size=32).quantize(jax.random.normal(jax.random.key(0), (256, 512)))


def lowered(w: Quantized, *platforms: str) -> str:
    x = jax.ShapeDtypeStruct((2, 256), jnp.float32)
    return jax.jit(matmul).trace(x, w).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize(("platform", "native"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_native_kernels_are_for_the_cpu(w: Quantized, platform: str, native: bool) -> None:
    assert kernels_cpu.available(), kernels_cpu.why_not()
    assert ("EffjaxQuantMatmul" in lowered(w, platform)) is native


@pytest.mark.parametrize(("platform", "loops"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_tiles_are_for_the_cpu_without_native_kernels(monkeypatch, w: Quantized, platform: str, loops: bool) -> None:
    monkeypatch.setattr(kernels_cpu, "available", lambda: False)
    columns = w.columns(jnp.arange(500))  # a shape that nothing else has lowered
    assert ("stablehlo.while" in lowered(columns, platform)) is loops


def test_an_exported_program_runs_without_our_kernels(w: Quantized) -> None:
    x = jax.random.normal(jax.random.key(1), (2, 256))
    exported = export.export(jax.jit(lambda x: matmul(x, w)))(x)
    assert "Effjax" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x), x @ w.materialize(), rtol=1e-5, atol=1e-4)


def test_spread_over_devices_the_compiler_gets_one_product(w: Quantized) -> None:
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(w, NamedSharding(mesh, P(None, "tensor")))
    x = jax.device_put(jnp.ones((2, 256)), NamedSharding(mesh, P()))
    program = jax.jit(matmul).lower(x, spread)
    assert "stablehlo.while" not in program.as_text()
    np.testing.assert_allclose(program.compile()(x, spread), x @ w.materialize(), rtol=1e-5, atol=1e-4)


def test_inside_shard_map_each_device_has_its_own_kernel(w: Quantized) -> None:
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = P(None, "tensor")
    local = jax.shard_map(matmul, mesh=mesh, in_specs=(P(), columns), out_specs=columns)
    x = jax.random.normal(jax.random.key(1), (2, 256))
    assert "EffjaxQuantMatmul" in jax.jit(local).lower(x, w).as_text()
    np.testing.assert_allclose(jax.jit(local)(x, w), x @ w.materialize(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("subscripts", "axes"),
    [("bmk,kn->bmn", (0, None)), ("mk,bkn->bmn", (None, 0)), ("bmk,bkn->bmn", (0, 0)), ("mbk,bkn->bmn", (1, 0))],
)
def test_batches_over_either_operand(subscripts: str, axes: tuple[int | None, int | None]) -> None:
    sizes = {"b": 3, "m": 4, "k": 64, "n": 16}
    left, right = (tuple(sizes[letter] for letter in term) for term in subscripts.split("->")[0].split(","))
    x = jax.random.normal(jax.random.key(1), left)
    w = RTN(bits=3, group_size=32).quantize(jax.random.normal(jax.random.key(2), right))
    expected = jnp.einsum(subscripts, x, w.materialize())
    np.testing.assert_allclose(jax.vmap(matmul, in_axes=axes)(x, w), expected, rtol=1e-4, atol=1e-4)


def test_batches_over_an_inner_axis_and_twice() -> None:
    w = RTN(bits=4, group_size=16).quantize(jax.random.normal(jax.random.key(2), (2, 3, 64, 16)))
    x = jax.random.normal(jax.random.key(1), (3, 5, 64))
    got = jax.vmap(jax.vmap(matmul, in_axes=(0, 0)), in_axes=(None, 0), out_axes=1)(x, w)
    np.testing.assert_allclose(got, jnp.einsum("bmk,abkn->bamn", x, w.materialize()), rtol=1e-4, atol=1e-4)


def test_a_matrix_that_cannot_be_tiled_says_so() -> None:
    w = RTN(bits=4, group_size=None).quantize(jnp.ones((12, 4)))
    assert block_rows(w) is None
    with pytest.raises(ValueError, match="use implementation='reference'"):
        matmul(jnp.ones((1, 12)), w, implementation="blocked")
