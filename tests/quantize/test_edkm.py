"""eDKM equals dense DKM: values, gradients, trajectories; and keeps two bytes a weight."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax.errors import LeafError
from effjax.quantize.dkm import DKM, dkm_soft
from effjax.quantize.edkm import EDKM, bit_patterns, edkm_soft, uniquify, values_of

PATHS = ("histogram", "sort", "direct")


def weights(shape, seed=0, dtype="bfloat16"):
    """Float32 values that the 16-bit dtype holds exactly."""
    return (0.02 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype).astype(jnp.float32)


# One object a path, so that tests share compiled programs.
UNIQUE = {path: functools.partial(edkm_soft, path=path) for path in PATHS}


def start(entries):
    return jnp.linspace(-0.05, 0.055, entries)


@functools.partial(jax.jit, static_argnums=0)
def both(fn, w, c, tau, g, g_c):
    """Values and pulled back cotangents."""
    values, pull = jax.vjp(fn, w, c, tau)
    return values, pull((g, g_c))


def assert_equal_calls(got, want, tolerance=1e-4):
    """Every array within a fraction of its largest entry."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-12))


@pytest.mark.parametrize(
    ("path", "entries", "iterations", "tau"),
    [
        ("histogram", 8, 3, 1e-4),
        ("histogram", 2, 5, 1e-3),
        ("histogram", 256, 2, 1e-5),
        ("sort", 16, 2, 2e-5),
        ("direct", 4, 1, 1e-3),
        ("direct", 16, 2, 2e-5),
    ],
)
def test_values_and_gradients_are_those_of_dense_dkm(path, entries, iterations, tau):
    """For weights, centroids and the temperature, with cotangents on both results."""
    w, c = weights((60, 50)), start(entries)
    g, g_c = jax.random.normal(jax.random.key(1), w.shape), jax.random.normal(jax.random.key(2), c.shape)
    unique = both(functools.partial(edkm_soft, iterations=iterations, path=path), w, c, jnp.float32(tau), g, g_c)
    dense = both(functools.partial(dkm_soft, iterations=iterations), w, c, jnp.float32(tau), g, g_c)
    assert_equal_calls(unique, dense)


@given(st.integers(0, 10**6), st.floats(0.05, 3.0), st.floats(0.01, 100.0))
@settings(max_examples=12)
def test_any_scale(seed, relative, size):
    """The bits of the weights spread over other exponents, and the gradient stays that of dense DKM."""
    w = weights((3000,), seed) * jnp.float32(2.0 ** round(np.log2(size)))
    c, tau = start(4) * size, jnp.float32(relative * float(w.var()))
    g, g_c = jax.random.normal(jax.random.key(seed), w.shape), jnp.ones(4)
    unique = both(UNIQUE["histogram"], w, c, tau, g, g_c)
    assert_equal_calls(unique, both(dkm_soft, w, c, tau, g, g_c), 5e-4)


def test_finite_differences():
    """The gradient of 20 weights against differences of dense DKM in float64, written in numpy."""
    w = np.asarray(weights((3000,)), np.float64)
    g = np.random.default_rng(0).standard_normal(3000)
    tau, c0 = 1e-4, np.asarray(start(4), np.float64)

    def loss(w):
        c = c0
        for _ in range(3):
            a = np.exp(-np.square(w[:, None] - c) / tau)
            a /= a.sum(1, keepdims=True)
            c = (a * w[:, None]).sum(0) / a.sum(0)
        return (g * (a @ c)).sum()

    for path in PATHS:
        single = [jnp.asarray(x, jnp.float32) for x in (w, c0, tau, g, np.zeros(4))]
        gradient = both(UNIQUE[path], *single)[1][0]
        for i in np.random.default_rng(1).choice(3000, 20, replace=False):
            step = 1e-6 * (np.arange(3000) == i)
            slope = (loss(w + step) - loss(w - step)) / 2e-6
            np.testing.assert_allclose(gradient[i], slope, rtol=1e-3, atol=1e-4)


def test_through_a_network():
    """Two clustered layers: gradients of the loss with respect to the master weights."""
    x = jax.random.normal(jax.random.key(3), (32, 40))
    params = [weights((40, 70), 1), weights((70, 10), 2)]

    def loss(soft, params):
        hidden = jax.nn.relu(x @ soft(params[0], start(4), 1e-4)[0])
        return jnp.square(hidden @ soft(params[1], start(4), 1e-4)[0] - 1).mean()

    unique = jax.jit(jax.grad(lambda p: loss(functools.partial(edkm_soft, path="histogram"), p)))(params)
    assert_equal_calls(unique, jax.jit(jax.grad(lambda p: loss(dkm_soft, p)))(params))


@pytest.mark.parametrize("path", PATHS)
def test_master_weights_are_rounded_and_the_rounding_is_passed_through(path):
    """The value is that of rounded weights; so is the gradient, to which rounding is the identity."""
    w = 0.02 * jax.random.normal(jax.random.key(5), (3000,))
    rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
    args = (start(4), jnp.float32(1e-4), jnp.sin(jnp.arange(3000.0)), jnp.zeros(4))
    unique = UNIQUE[path]
    assert_equal_calls(both(unique, w, *args), both(unique, rounded, *args), 0)
    dense = DKM(bits=2, round_to="bfloat16")
    assert_equal_calls(both(unique, w, *args), both(dense.soft, w, *args))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_are_taken_as_they_are(dtype):
    w = weights((2000,), dtype=dtype)
    args = (start(4), jnp.float32(1e-4))
    got, centroids = jax.jit(functools.partial(edkm_soft, path="histogram"))(w.astype(dtype), *args)
    want, moved = jax.jit(dkm_soft)(w, *args)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(centroids, moved, rtol=1e-4, atol=1e-7)
    gradient = jax.jit(jax.grad(lambda w: edkm_soft(w, *args, path="histogram")[0].sum()))(w.astype(dtype))
    assert gradient.dtype == dtype and jnp.isfinite(gradient).all()


def test_a_centroid_without_weights_stays():
    """As in dense DKM, and nothing becomes NaN."""
    w, c = weights((3000,)), jnp.array([-0.02, 0.01, 0.02, 5.0])
    # With a constant cotangent the terms cancel, and float32 leaves dense DKM only three digits.
    args = (w, c, jnp.float32(1e-4), jnp.sin(jnp.arange(3000.0)), jnp.zeros(4))
    for path in PATHS:
        got = both(UNIQUE[path], *args)
        assert float(got[0][1][3]) == 5.0
        assert_equal_calls(got, both(dkm_soft, *args))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_patterns_round_trip_bit_for_bit(dtype):
    """All finite values of 16 bits, so minus zero and subnormal ones too."""
    every = np.arange(65536, dtype=np.uint16)
    values = every.view(np.dtype(dtype))
    finite = np.isfinite(values.astype(np.float32))
    np.testing.assert_array_equal(bit_patterns(jnp.asarray(values), dtype)[finite], every[finite])
    back = np.asarray(values_of(jnp.asarray(every), dtype))
    np.testing.assert_array_equal(back[finite].view(np.uint32), values.astype(np.float32)[finite].view(np.uint32))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=64, max_size=64))
@settings(max_examples=25)
def test_rounding_is_to_nearest_even(values):
    """As ml_dtypes rounds, at ties, subnormals and infinities."""
    w = np.asarray(values, np.float32)
    ties = (np.arange(64, dtype=np.uint32) << 20 | 0x8000 | 0x3F800000).view(np.float32)
    for x in (w, ties):
        np.testing.assert_array_equal(
            jax.jit(bit_patterns)(jnp.asarray(x)), x.astype(ml_dtypes.bfloat16).view(np.uint16)
        )


SAMPLES = {
    "normal": np.asarray(0.02 * np.random.default_rng(0).standard_normal(5000), np.float32),
    "equal": np.full(300, 0.375, np.float32),
    "zeros of both signs": np.array([0.0, -0.0, -0.0, 1.0] * 40, np.float32),
    "subnormal": np.array([2.0**-130, -(2.0**-133), 2.0**-126, 0.0] * 10, np.float32),
    "one": np.array([3.0], np.float32),
    "more than a slice": np.random.default_rng(1).standard_normal(70_000).astype(np.float32),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("path", PATHS)
def test_the_table_holds_every_weight_bit_for_bit(name, path):
    """`table[index]` is the rounded weight, counts are those of numpy."""
    w = SAMPLES[name]
    want = w.astype(ml_dtypes.bfloat16).view(np.uint16)
    table, index = jax.jit(functools.partial(uniquify, path=path))(jnp.asarray(w))
    rows = np.arange(65536, dtype=np.uint16) if table.patterns is None else np.asarray(table.patterns).ravel()
    np.testing.assert_array_equal(rows[np.asarray(index)], want)
    distinct, counts = np.unique(want, return_counts=True)
    n = np.asarray(table.counts).ravel()
    np.testing.assert_array_equal(np.bincount(rows, n, minlength=65536)[distinct], counts)
    assert n.sum() == w.size
    blocks = table.counts.any(1)
    np.testing.assert_array_equal(np.sort(table.order[: table.occupied])[: blocks.sum()], np.flatnonzero(blocks))


def residual_bytes(fn, *args):
    """Bytes of what the backward pass needs, from the closure of `vjp`."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *args)))


def temporary_bytes(fn, w, c):
    def gradient(w, c, tau, g):
        (_, centroids), pull = jax.vjp(fn, w, c, tau)
        return pull((g, jnp.zeros_like(centroids)))

    compiled = jax.jit(gradient).lower(w, c, jax.ShapeDtypeStruct((), jnp.float32), w).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("n", [1 << 16, 1 << 20])
def test_memory(n):
    """Two bytes a weight and the centroids are kept; hundreds of times less than dense, and so are temporary bytes."""
    w, c = jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    tau = jax.ShapeDtypeStruct((), jnp.float32)
    kept, dense = residual_bytes(edkm_soft, w, c, tau), residual_bytes(dkm_soft, w, c, tau)
    assert kept == 2 * n + 4 * (4 * 8 + 3 * 8 + 1)
    assert dense >= 100 * kept
    ratio = temporary_bytes(dkm_soft, w, c) / temporary_bytes(edkm_soft, w, c)
    assert ratio >= (100 if n == 1 << 20 else 20)


@pytest.mark.parametrize(
    ("kind", "devices", "replicated", "shape"),
    [
        (AxisType.Auto, 8, True, (63, 7)),
        (AxisType.Auto, 4, False, (64, 20)),
        (AxisType.Explicit, 4, True, (64, 20)),
        (AxisType.Explicit, 4, False, (64, 20)),
    ],
)
def test_sharded_index(kind, devices, replicated, shape):
    """The same values and gradients; every device keeps its share of the index, also where it does not divide."""
    mesh = jax.make_mesh((8 // devices, devices), ("other", "data"), axis_types=(kind, kind))
    w, g = weights(shape), jax.random.normal(jax.random.key(1), shape)
    args = (start(4), jnp.float32(1e-4))
    want = both(edkm_soft, w, *args, g, jnp.ones(4))
    fn = functools.partial(edkm_soft, axis="data", replicated=replicated)
    with jax.set_mesh(mesh):
        w, g = jax.device_put((w, g), NamedSharding(mesh, P() if replicated else P("data")))
        got = both(fn, w, *args, g, jnp.ones(4))
        kept = jax.tree.leaves(jax.jit(lambda *a: jax.vjp(fn, *a)[1])(w, *args))
    assert_equal_calls(got, want, 1e-5)
    assert got[1][0].sharding.is_equivalent_to(w.sharding, 2) and got[0][0].sharding.is_equivalent_to(w.sharding, 2)
    (index,) = (x for x in kept if x.dtype == jnp.uint16)
    share = -(-w.size // devices)
    assert [s.data.shape for s in index.addressable_shards] == [(share,)] * 8
    assert sum(x.addressable_shards[0].data.nbytes for x in kept) == 2 * share + 4 * (4 * 4 + 3 * 4 + 1)


def test_vmap_scan_and_remat():
    """Over stacked layers: what a loop over them gives, values and gradients."""
    w, tau = weights((3, 40, 30)), jnp.array([1e-4, 3e-5, 1e-3])
    c = jnp.stack([start(4) * s for s in (0.7, 1.0, 1.2)])
    g = jax.random.normal(jax.random.key(1), w.shape)
    soft = UNIQUE["histogram"]
    one = jax.jit(soft)

    def loop(w, c, tau):
        return jnp.stack([one(w[i], c[i], tau[i])[0] for i in range(3)])

    def scan(w, c, tau):
        return jax.lax.scan(lambda _, x: (None, jax.checkpoint(soft)(*x)[0]), None, (w, c, tau))[1]

    def pulled(fn):
        return jax.jit(lambda *a: (fn(*a), jax.vjp(fn, *a)[1](g)))(w, c, tau)

    want = pulled(loop)
    assert_equal_calls(pulled(lambda *a: jax.vmap(soft)(*a)[0]), want, 1e-5)
    assert_equal_calls(pulled(scan), want, 1e-5)


def test_trajectories_of_dense_and_unique_training():
    """50 steps of Adam on a two-layer network: parameters stay within a thousandth of each other."""
    x = jax.random.normal(jax.random.key(0), (64, 24))
    y = jnp.sin(x[:, :4].sum(1))
    params = {"a": {"kernel": weights((24, 48), 1) * 10}, "b": {"kernel": weights((48, 1), 2) * 10}}
    optimizer = optax.adam(1e-3)

    def train(method):
        def step(carry, _):
            params, state, clusters = carry

            def loss(params):
                soft, moved = ej.quantize.palettize(params, method, clusters)
                return jnp.square((jax.nn.relu(x @ soft["a"]["kernel"]) @ soft["b"]["kernel"])[:, 0] - y).mean(), moved

            (value, clusters), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state, clusters), value

        carry = (params, optimizer.init(params), ej.quantize.init_clusters(params, method))
        (trained, _, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=50))(carry)
        return trained, losses

    dense, losses = train(DKM(bits=2, round_to="bfloat16"))
    unique, same = train(EDKM(bits=2, path="histogram"))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(same, losses, rtol=1e-3)
    for a, b in zip(jax.tree.leaves(unique), jax.tree.leaves(dense), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-3 * float(jnp.linalg.norm(b))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: edkm_soft(jnp.ones(4), jnp.ones(2), 1.0, 0), "iterations=0: at least one"),
        (lambda: edkm_soft(jnp.arange(4), jnp.ones(2), 1.0), "weights of int32: clusters are of floating weights"),
        (
            lambda: edkm_soft(jnp.ones(4), jnp.ones(2), 1.0, round_to="float32"),
            "round_to='float32': 16-bit floating dtypes are 'bfloat16' and 'float16'",
        ),
        (
            lambda: edkm_soft(jnp.ones(4), jnp.ones(2), 1.0, axis="data"),
            r"axis='data' is none of the mesh in context \({}\): use jax.set_mesh",
        ),
    ],
)
def test_wrong_calls(call, text):
    with pytest.raises(LeafError, match=f"^{text}$"):
        call()


def test_a_weight_that_its_devices_cannot_share():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    text = r"^a weight \[12, 3\] cannot be cut over 8 devices: pass replicated=True$"
    with jax.set_mesh(mesh), pytest.raises(LeafError, match=text):
        edkm_soft(jnp.ones((12, 3)), jnp.ones(2), 1.0, axis="data", replicated=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"round_to": None}, r"round_to=None: choose 'bfloat16' or 'float16' \(DKM takes weights as they are\)"),
        ({"path": "tree"}, "path='tree': choose 'auto', 'histogram', 'sort' or 'direct'"),
        ({"bits": 9}, "bits=9: choose 1 to 8"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        EDKM(**options)
