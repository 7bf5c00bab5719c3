"""Lifted models on eight devices: Auto and Explicit axes, shard_map outside and inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax.errors import MaterializeError
from tests.lift.kinds import assert_close, compress, strict


def mesh(axis_type, shape=(2, 4), names=("data", "tensor")):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


SPECS = {
    "embed": {"embedding": P(None, None)},
    "up": {"kernel": P(None, None, "tensor"), "bias": P(None, "tensor")},
    "down": {"kernel": P(None, "tensor", None)},
    "head": {"kernel": P("data", "tensor")},
}


def model(params, tokens):
    """Lookup, two scanned layers with a column- and a row-parallel matrix, and a projection."""
    x = params["embed"]["embedding"][tokens]

    def layer(x, w):
        h = jnp.tanh(x @ w["up"]["kernel"] + w["up"]["bias"])
        return x + h @ w["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, {"up": params["up"], "down": params["down"]})
    return x @ params["head"]["kernel"]


@functools.cache
def dense():
    k = jax.random.split(jax.random.key(0), 5)
    return {
        "embed": {"embedding": jax.random.normal(k[0], (24, 16))},
        "up": {"kernel": jax.random.normal(k[1], (2, 16, 64)) / 4, "bias": jax.random.normal(k[2], (2, 64))},
        "down": {"kernel": jax.random.normal(k[3], (2, 64, 16)) / 8},
        "head": {"kernel": jax.random.normal(k[4], (16, 32)) / 4},
    }


def parameters(kind):
    kernels = compress(dense(), kind, "*/kernel")
    return kernels if kind == "hashed" else compress(kernels, kind, "*/embedding")


def placed(params, mesh):
    specs = ej.partition_specs(params, SPECS, mesh)
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs)


def expected(params, tokens):
    return jax.jit(lambda p, t: model(ej.materialize(p), t))(params, tokens)


TOKENS = np.arange(12, dtype=np.int32).reshape(4, 3)


@pytest.mark.parametrize("kind", ["quantized", "nm_sparse", "hashed"])
def test_auto_axes(kind):
    params, devices = parameters(kind), mesh(AxisType.Auto)
    with jax.set_mesh(devices):
        sharded = placed(params, devices)
        tokens = jax.device_put(TOKENS, NamedSharding(devices, P("data")))
        actual = jax.jit(ej.lift(model))(sharded, tokens)
    assert_close(actual, expected(params, TOKENS))
    if kind == "quantized":
        codes = sharded["up"]["kernel"].codes
        assert codes.sharding.shard_shape(codes.shape)[-1] == 16  # an eighth of the mesh's rows, a quarter of columns


def explicit_model(params, tokens):
    """The same with the types explicit axes ask for where they cannot be inferred."""
    x = params["embed"]["embedding"].at[tokens].get(out_sharding=P("data", None, None))

    def layer(x, w):
        h = jnp.tanh(x @ w["up"]["kernel"] + w["up"]["bias"])
        return x + jnp.matmul(h, w["down"]["kernel"], out_sharding=P("data", None, None)), None

    x, _ = jax.lax.scan(layer, x, {"up": params["up"], "down": params["down"]})
    return jnp.matmul(x, params["head"]["kernel"], out_sharding=P("data", None, "tensor"))


@pytest.mark.parametrize("kind", ["quantized", "nf4", "hashed", "sum"])
def test_explicit_axes(kind):
    params, devices = parameters(kind), mesh(AxisType.Explicit)
    with jax.set_mesh(devices):
        sharded = placed(params, devices)
        tokens = jax.device_put(TOKENS, NamedSharding(devices, P("data")))
        actual = jax.jit(ej.lift(explicit_model))(sharded, tokens)
        assert jax.typeof(actual).sharding.spec == P("data", None, "tensor")
    assert_close(jax.device_get(actual), jax.device_get(expected(params, TOKENS)))


@pytest.mark.parametrize("kind", ["quantized", "low_rank"])
def test_explicit_axes_gradient_of_inputs_and_fields(kind):
    params, devices = parameters(kind), mesh(AxisType.Explicit)

    def gradients(apply, params, x):
        trainable, frozen = ej.partition(params)

        def loss(trainable, x):
            return jnp.square(apply(ej.combine(trainable, frozen), x)).sum()

        return jax.grad(loss, argnums=(0, 1))(trainable, x)

    def head(params, x):
        return jnp.matmul(x, params, out_sharding=P("data", "tensor"))

    x = jax.random.normal(jax.random.key(3), (4, 16))
    want = jax.jit(functools.partial(gradients, lambda w, x: x @ w.materialize()))(params["head"]["kernel"], x)
    with jax.set_mesh(devices):
        w = placed(params, devices)["head"]["kernel"]
        got = jax.jit(functools.partial(gradients, strict(head)))(
            w, jax.device_put(x, NamedSharding(devices, P("data")))
        )
    assert_close(jax.device_get(got), jax.device_get(want))


def test_explicit_axes_reshard_stack_slices_and_made_dense():
    w, devices = compress(dense()["up"]["kernel"], "quantized", "*"), mesh(AxisType.Explicit)

    def fn(w, x):
        gathered = jax.sharding.reshard(w, P(None, None, None))
        pair = jnp.stack([w[0], w[1]])
        return (
            jnp.matmul(x, gathered[1], out_sharding=P("data", None)),
            jnp.matmul(x, pair[1], out_sharding=P("data", "tensor")),
            jnp.matmul(x, w[0].T.T, out_sharding=P("data", "tensor")),
        )

    x = jax.random.normal(jax.random.key(3), (4, 16))
    want = jax.jit(lambda w, x: (x @ w[1], x @ w[1], x @ w[0]))(w.materialize(), x)
    with jax.set_mesh(devices):
        specs = ej.partition_specs(w, SPECS["up"]["kernel"], devices)
        sharded = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(devices, s)), w, specs)
        x = jax.device_put(x, NamedSharding(devices, P("data")))
        got = jax.jit(strict(fn))(sharded, x)
        doubled = jax.jit(ej.lift(lambda w: 2 * w))(sharded)
    assert_close(jax.device_get(got), jax.device_get(want))
    assert_close(jax.device_get(doubled), 2 * jax.device_get(w.materialize()))


def test_sharding_constraints_on_weights_and_activations():
    w, devices = compress(dense()["head"]["kernel"], "quantized", "*"), mesh(AxisType.Auto)

    def fn(w, x):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(devices, P(None, "tensor")))
        return jax.lax.with_sharding_constraint(x @ w, NamedSharding(devices, P("data", "tensor")))

    x = jax.random.normal(jax.random.key(3), (4, 16))
    got = jax.jit(strict(fn))(w, x)
    assert got.sharding.spec == P("data", "tensor")
    assert_close(got, jax.jit(lambda w, x: x @ w.materialize())(w, x))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_whole_model_inside_shard_map(axis_type):
    """Data parallel: every device runs the lifted model on its rows with all the weights."""
    params, devices = parameters("quantized"), mesh(axis_type, (8,), ("data",))
    tokens = np.arange(24, dtype=np.int32).reshape(8, 3)
    with jax.set_mesh(devices):
        run = jax.shard_map(strict(model), in_specs=(P(), P("data")), out_specs=P("data"))
        got = jax.jit(run)(params, jax.device_put(tokens, NamedSharding(devices, P("data"))))
    assert_close(jax.device_get(got), jax.device_get(expected(params, tokens)))


def tensor_parallel(devices, up_spec, down_spec):
    """Two matrices inside a shard_map: columns of the first and rows of the second on each device."""

    def body(x, up, down):
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    def fn(params, x):
        run = jax.shard_map(body, mesh=devices, in_specs=(P("data"), up_spec, down_spec), out_specs=P("data"))
        return run(x, params["up"], params["down"])

    return fn


@pytest.mark.parametrize("kind", ["quantized", "nm_sparse", "low_rank", "sum"])
def test_tensor_parallel_inside_the_model(kind):
    devices = mesh(AxisType.Auto)
    matrices = {"up": dense()["up"]["kernel"][0], "down": dense()["down"]["kernel"][0]}
    params = compress(matrices, kind, "*")
    x = jax.random.normal(jax.random.key(3), (4, 16))
    fn = tensor_parallel(devices, P(None, "tensor"), P("tensor", None))
    got = jax.jit(strict(fn))(params, x)
    want = jax.jit(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])(ej.materialize(params), x)
    assert_close(got, want)
    assert not strict(fn).coverage(params, x).materialized


def test_tensor_parallel_gradients():
    devices = mesh(AxisType.Auto)
    matrices = {"up": dense()["up"]["kernel"][0], "down": dense()["down"]["kernel"][0]}
    trainable, frozen = ej.partition(compress(matrices, "quantized", "*"))
    x = jax.random.normal(jax.random.key(3), (4, 16))
    fn = tensor_parallel(devices, P(None, "tensor"), P("tensor", None))

    def gradient(apply):
        def loss(trainable, x):
            return jnp.square(apply(ej.combine(trainable, frozen), x)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(trainable, x)

    want = gradient(lambda p, x: jnp.tanh(x @ p["up"].materialize()) @ p["down"].materialize())
    assert_close(gradient(strict(fn)), want, tolerance=2e-3)  # scales, and sums of their gradients, are float16


def test_heads_cut_over_devices():
    """A weight under another shape: the major part of its outputs is cut."""
    devices = mesh(AxisType.Auto)
    w = compress(dense()["up"]["kernel"][0], "quantized", "*")

    def fn(w, x):
        def body(x, w):
            return jnp.einsum("bd,dhk->bhk", x, w)

        specs = (P("data"), P(None, "tensor", None))
        return jax.shard_map(body, mesh=devices, in_specs=specs, out_specs=P("data", "tensor"))(x, w.reshape(16, 8, 8))

    x = jax.random.normal(jax.random.key(3), (4, 16))
    assert_close(jax.jit(strict(fn))(w, x), (x @ w.materialize()).reshape(4, 8, 8))


@pytest.mark.parametrize("kind", ["quantized", "hashed", "nm_sparse"])
def test_a_cut_inside_a_group_makes_the_weight_dense(kind):
    """16 inputs in groups of 8 (or of 4) cannot be cut over 8 devices; the result stays right."""
    devices = mesh(AxisType.Auto, (8,), ("tensor",))
    w = compress(dense()["up"]["kernel"][0], kind, "*")

    def fn(w, x):
        def body(x, w):
            return jax.lax.psum(x @ w, "tensor")

        return jax.shard_map(body, mesh=devices, in_specs=(P(None, "tensor"), P("tensor")), out_specs=P())(x, w)

    x = jax.random.normal(jax.random.key(3), (4, 16))
    with pytest.raises(MaterializeError, match="shard_map input"):
        strict(fn)(w, x)
    assert_close(jax.jit(ej.lift(fn))(w, x), jax.jit(lambda w, x: x @ w.materialize())(w, x))


def test_zero_points_that_share_bytes_are_not_cut_apart():
    """Four groups of 3-bit zero points lie in two bytes: cutting the groups in two would read the wrong ones."""
    devices, name = mesh(AxisType.Auto), "data"
    w = ej.quantize.RTN(bits=3, group_size=8).quantize(jax.random.normal(jax.random.key(0), (32, 8)) + 0.5)

    def fn(w, x):
        def body(x, w):
            return jax.lax.psum(x @ w, name)

        return jax.shard_map(body, mesh=devices, in_specs=(P(None, name), P(name)), out_specs=P())(x, w)

    x = jax.random.normal(jax.random.key(3), (4, 32))
    assert_close(jax.jit(ej.lift(fn))(w, x), jax.jit(lambda w, x: x @ w.materialize())(w, x))


def test_partial_manual_axes():
    devices = mesh(AxisType.Auto)
    w = compress(dense()["up"]["kernel"][0], "quantized", "*")

    def fn(w, x):
        return jax.shard_map(
            lambda x, w: x @ w, mesh=devices, in_specs=(P(), P(None, "tensor")), out_specs=P(None, "tensor"),
            axis_names={"tensor"},
        )(x, w)  # fmt: skip

    x = jax.random.normal(jax.random.key(3), (4, 16))
    assert_close(jax.jit(strict(fn))(w, x), jax.jit(lambda w, x: x @ w.materialize())(w, x))
