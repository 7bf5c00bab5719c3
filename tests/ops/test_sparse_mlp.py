"""MLPs of which some neurons are computed: every implementation against loops of numpy, derivatives, and the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import LeafError
from effjax.ops.neurons import make_neurons
from effjax.ops.sparse_mlp import choose, choose_neurons, estimates, mlp, sparse_mlp, sparse_mlp_used, top_mask

ACT = {
    "relu": lambda z: max(z, 0.0),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
}


def kernels(d=9, neurons=24, out=7, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "up": (d, neurons),
        "gate": (d, neurons),
        "down": (neurons, out),
        "up_bias": (neurons,),
        "gate_bias": (neurons,),
        "down_bias": (out,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def oracle(x, k, chosen, activation, gated, biased, shift=0.0):
    """Neuron by neuron, in float64; also which of them are not zero."""
    used = set()
    y = np.zeros((len(x), k["down"].shape[1]))
    for b, row in enumerate(np.asarray(x, np.float64)):
        for j in chosen:
            if not 0 <= j < k["up"].shape[1]:
                continue
            z = row @ k["up"][:, j] + (k["up_bias"][j] if biased else 0)
            gate = row @ k["gate"][:, j] + (k["gate_bias"][j] if biased else 0)
            h = ACT[activation](gate - shift) * z if gated else ACT[activation](z - shift)
            y[b] += h * k["down"][j]
            used |= {j} if h else set()
        y[b] += k["down_bias"] if biased else 0
    return y, used


def made(k, activation, gated, biased, shift=0.0):
    return make_neurons(
        jnp.asarray(k["up"]),
        jnp.asarray(k["down"]),
        gate=jnp.asarray(k["gate"]) if gated else None,
        up_bias=jnp.asarray(k["up_bias"]) if biased else None,
        gate_bias=jnp.asarray(k["gate_bias"]) if biased and gated else None,
        down_bias=jnp.asarray(k["down_bias"]) if biased else None,
        activation=activation,
        shift=shift,
    )


@pytest.mark.parametrize("implementation", [None, "reference", "dense", "cpu"])
@pytest.mark.parametrize(
    ("activation", "gated", "biased", "batch", "shift"),
    [
        ("relu", False, True, 1, 0.0),
        ("silu", True, False, 3, 0.0),
        ("gelu", False, False, 6, 0.5),
        ("relu", True, True, 2, 0.5),
        ("silu", True, True, 1, 0.0),
        ("relu", False, False, 1, 1.0),
    ],
)
def test_is_its_definition(implementation, activation, gated, biased, batch, shift):
    k = kernels()
    x = np.random.default_rng(1).normal(size=(batch, 9)).astype(np.float32)
    neurons = made(k, activation, gated, biased, shift)
    run = jax.jit(functools.partial(sparse_mlp_used, implementation=implementation))
    for chosen, count in (([3, 9, 9, 9], 1), ([0, 23, 5, 11], 4), ([7, 2, 9, 1], 2), ([-1, 24, 4, 6], 4), ([4] * 4, 0)):
        want, live = oracle(x, k, chosen[:count], activation, gated, biased, shift)
        got, used = run(jnp.asarray(x), neurons, jnp.asarray(chosen, jnp.int32), count)
        assert got.dtype == jnp.float32 and set(np.flatnonzero(used)) == live
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    want, _ = oracle(x, k, range(24), activation, gated, biased, shift)
    np.testing.assert_allclose(mlp(jnp.asarray(x), neurons), want, rtol=1e-4, atol=1e-4)


def test_blocks_are_runs_of_neurons():
    k = kernels()
    x = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
    neurons = made(k, "relu", False, True)
    want, _ = oracle(x, k, [8, 9, 10, 11, 0, 1, 2, 3], "relu", False, True)
    for implementation in ("reference", "dense", "cpu"):
        got = sparse_mlp(jnp.asarray(x), neurons, jnp.array([2, 0, 1, 6]), 2, block=4, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_derivatives_are_those_of_the_masked_mlp(gated):
    neurons = made(kernels(), "silu", gated, True)
    x = jax.random.normal(jax.random.key(0), (3, 9))
    chosen = jnp.array([3, 20, 8, 2], jnp.int32)
    mask = jnp.zeros(24).at[chosen[:3]].set(1.0)
    want = jax.grad(lambda x, n: jnp.square(mlp(x, n, mask=mask)).sum(), argnums=(0, 1))(x, neurons)
    for implementation in (None, "reference", "dense", "cpu"):

        def loss(x, n, i=implementation):
            return jnp.square(sparse_mlp(x, n, chosen, 3, implementation=i)).sum()

        got = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, neurons)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, True), (8, 32, False), (4, 32, True), (4, None, False)]
)
def test_quantized_kernels_keep_their_codes(bits, group, symmetric):
    k = kernels(d=64, neurons=32, out=96)
    method = ej.quantize.RTN(bits=bits, group_size=group, symmetric=symmetric)
    q = {name: method.quantize(jnp.asarray(k[name])) for name in ("up", "gate", "down")}
    neurons = make_neurons(q["up"], q["down"], gate=q["gate"], activation="silu")
    dense = {name: np.asarray(leaf.materialize()) for name, leaf in q.items()}
    # The codes themselves, and scales and zero points in float32.
    codes = bits * 3 * 64 / 8 + bits * 32 / 8
    assert neurons.bytes_per_neuron >= codes and neurons.up.codes.size == 64 * 32 * bits // 8
    x = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    chosen = [31, 0, 7, 12]
    want, _ = oracle(x, dense, chosen, "silu", True, False)
    for implementation in (None, "reference", "dense", "cpu"):
        got = jax.jit(functools.partial(sparse_mlp, implementation=implementation))(
            jnp.asarray(x), neurons, jnp.asarray(chosen)
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_maps_shapes_and_programs():
    neurons, x = made(kernels(), "relu", False, True), jax.random.normal(jax.random.key(0), (4, 2, 9))
    chosen = jnp.array([1, 5, 9], jnp.int32)
    want = sparse_mlp(x, neurons, chosen, implementation="reference")
    assert want.shape == (4, 2, 7)
    np.testing.assert_allclose(jax.vmap(lambda x: sparse_mlp(x, neurons, chosen))(x), want, rtol=1e-4, atol=1e-5)
    each = jnp.stack([chosen, chosen + 1, chosen + 2, chosen + 3])
    mapped = jax.jit(jax.vmap(lambda x, c: sparse_mlp(x, neurons, c)))(x, each)
    for i in range(4):
        np.testing.assert_allclose(mapped[i], sparse_mlp(x[i], neurons, each[i]), rtol=1e-4, atol=1e-5)
    assert "EffjaxSparseMlp" in jax.jit(sparse_mlp).lower(x[0], neurons, chosen).as_text()
    large = jnp.ones((2000, 9))
    assert "EffjaxSparseMlp" not in jax.jit(sparse_mlp).lower(large, neurons, jnp.arange(24)).as_text()


def test_the_choice_of_an_implementation():
    def abstract(dtype, d=2048, n=8192):
        return jax.eval_shape(lambda w: make_neurons(w, w.T), jax.ShapeDtypeStruct((d, n), dtype))

    one, many = (jax.ShapeDtypeStruct((rows, 2048), jnp.float32) for rows in (1, 512))
    dense32 = abstract(jnp.float32)
    assert choose("cpu", one, dense32, 2048) == "cpu" and choose("cpu", many, dense32, 8192) == "dense"
    assert choose("tpu", one, abstract(jnp.bfloat16), 16, block=128) == "tpu"
    assert "tpu" not in estimates("tpu", one, abstract(jnp.bfloat16), 16, block=1)
    assert set(estimates("cuda", one, dense32, 100)) == {"reference", "dense"}


def test_bad_input_is_named():
    neurons = made(kernels(), "relu", False, False)
    with pytest.raises(ValueError, match=r"x \[8\], 24 neurons of 9 inputs, chosen \[1\] and block=1 do not fit"):
        sparse_mlp(jnp.ones(8), neurons, jnp.array([1]))
    with pytest.raises(ValueError, match="block=5 do not fit"):
        sparse_mlp(jnp.ones(9), neurons, jnp.array([1]), block=5)
    with pytest.raises(ValueError, match="implementation='rocm' does not take this: there is none of that name"):
        sparse_mlp(jnp.ones(9), neurons, jnp.array([1]), implementation="rocm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block=1: the TPU's kernel brings blocks of a multiple of 8"):
        sparse_mlp(jnp.ones(9), neurons, jnp.array([1]), implementation="tpu")
    with pytest.raises(LeafError, match=r"up \[3, 8\], down \[7, 2\] do not fit"):
        make_neurons(jnp.ones((3, 8)), jnp.ones((7, 2)))
    with pytest.raises(LeafError, match=r"up \[2, 3, 8\] is no matrix: map over stacked layers"):
        make_neurons(jnp.ones((2, 3, 8)), jnp.ones((2, 8, 2)))
    with pytest.raises(LeafError, match="kernels of different kinds"):
        make_neurons(jnp.ones((3, 8)), jnp.ones((8, 2), jnp.bfloat16))
    q = ej.quantize.RTN(bits=3, group_size=None).quantize(jnp.ones((32, 32)))
    with pytest.raises(LeafError, match="only dense kernels and Quantized ones of 4 or 8 bits have rows; materialize"):
        make_neurons(q, q)
    q = ej.quantize.RTN(bits=4, group_size=8).quantize(jnp.ones((32, 32)))
    with pytest.raises(LeafError, match="rows of 32 codes in groups of 8 are no whole runs of 32"):
        make_neurons(q, q)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1, 1), (1, 37, 11), (3, 18, 5)]))
@example(5883, (3, 18, 5))  # zeros of both signs
def test_the_union_of_the_best(seed, shape):
    rng = np.random.default_rng(seed)
    rows, n, k = shape
    # Few different values, so that there are ties, and zeros of both signs.
    scores = (rng.integers(-3, 4, (rows, n)) / 2 * np.where(rng.random((rows, n)) < 0.5, 1.0, -1.0)).astype(np.float32)
    threshold = float(rng.choice([-np.inf, 0.0, 0.5]))
    union = set()
    for row in scores:
        best = sorted(range(n), key=lambda j: (-row[j], j))[:k]
        union |= {j for j in best if row[j] > threshold}
    for implementation in ("reference", "cpu"):
        chosen, count = choose_neurons(jnp.asarray(scores), k, threshold, implementation=implementation)
        assert chosen.shape == (min(n, rows * k),) and chosen.dtype == jnp.int32
        assert np.asarray(chosen).tolist() == sorted(union) + [n] * (len(chosen) - len(union))
        assert int(count) == len(union)
    np.testing.assert_array_equal(
        np.asarray(top_mask(jnp.asarray(scores), k, threshold)).any(0), [j in union for j in range(n)]
    )


def test_choosing_in_programs():
    scores = jax.random.normal(jax.random.key(0), (3, 500))
    want = choose_neurons(scores, 40, implementation="reference")
    jitted = jax.jit(choose_neurons, static_argnums=1)
    assert "EffjaxChooseNeurons" in jitted.lower(scores, 40).as_text()
    for got in (jitted(scores, 40), choose_neurons(scores, 40)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    mapped = jax.vmap(lambda s: choose_neurons(s, 40)[0])(scores)
    np.testing.assert_array_equal(mapped[1], choose_neurons(scores[1], 40)[0])
    # A choice has no derivative, and does not hinder that of what it chooses for.
    neurons = made(kernels(neurons=24), "relu", False, False)

    def loss(x):
        return sparse_mlp(x, neurons, *choose_neurons(x @ jnp.ones((9, 24)), 5)).sum()

    assert jax.grad(loss)(jnp.ones(9)).shape == (9,)
    with pytest.raises(ValueError, match="k=0 of 500 neurons"):
        choose_neurons(scores, 0)
    with pytest.raises(ValueError, match="implementation='tpu': choose 'reference' or 'cpu'"):
        choose_neurons(scores, 1, implementation="tpu")  # type: ignore[arg-type]
