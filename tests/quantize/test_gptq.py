"""GPTQ against optimal brain quantization in numpy: grids, orders, groups, and what a user may get wrong."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays import Permuted, Quantized
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.quantize import GPTQ, RTN
from tests.quantize.second_order import inputs, layer_error, moment, obq

compress = jax.jit(lambda method, w, stats: method.compress(w, stats=stats), static_argnums=0)
dense = jax.jit(lambda q: q.materialize())


def statistics(x) -> InputStats:
    x = jnp.asarray(x)
    return InputStats(count=jnp.float32(x.shape[-2]), outer_sum=x.mT @ x)


def weights(n, out, seed=1):
    return np.random.default_rng(seed).standard_normal((n, out)).astype(np.float32)


def grid_of(rows, bits, symmetric, clip):
    """Scale and zero point of every column: the usual rules, with the scale as it is stored."""
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    if symmetric:
        top = np.maximum(-low, high)
        scale = 2 * top / (2**bits - 1) if clip == "full" else top / (2 ** (bits - 1) - 1)
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / (2**bits - 1)
    scale = scale.astype(np.float32).astype(np.float16).astype(np.float64)
    scale = np.where(scale > 0, scale, 1)
    return scale, zero if symmetric else np.clip(np.round(-low / scale), 0, 2**bits - 1)


def oracle(w, x, bits, group_size, *, symmetric=False, clip="absmax", act_order=False, static=False, damping=0.01):
    n = len(w)
    size = n if group_size is None else group_size
    h = moment(x)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    grids = {}
    if static or size == n:
        grids = {g: grid_of(w[g * size : (g + 1) * size], bits, symmetric, clip) for g in range(n // size)}
    place = {int(j): i for i, j in enumerate(order)}

    def quantize(j, row, current):
        group = j // size if static or size == n else place[j] // size
        if group not in grids:
            grids[group] = grid_of(current[order[group * size : (group + 1) * size]], bits, symmetric, clip)
        scale, zero = grids[group]
        return scale * (np.clip(np.round(row / scale) + zero, 0, 2**bits - 1) - zero)

    return obq(w, h, damping, quantize, order)[0]


@given(
    st.sampled_from([(24, 5, 8), (24, 3, None), (33, 4, 11), (7, 2, None)]),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([(False, False), (True, True), (True, False)]),
    st.integers(0, 5),
)
@settings(max_examples=8)
def test_oracle(shape, bits, symmetric, orders, seed):
    n, out, group_size = shape
    act_order, static = orders
    w, x = weights(n, out, seed), inputs(n, seed=seed)
    clip = "full" if symmetric and bits == 2 else "absmax"
    method = GPTQ(
        bits=bits, group_size=group_size, symmetric=symmetric, clip=clip, act_order=act_order, static_groups=static
    )
    q = compress(method, w, statistics(x))
    assert isinstance(q, Permuted) == (act_order and not static and group_size is not None)
    assert q.shape == w.shape
    wanted = oracle(w, x, bits, group_size, symmetric=symmetric, clip=clip, act_order=act_order, static=static)
    h = moment(x)
    found, best = layer_error(w, dense(q), h), layer_error(w, wanted, h)
    # A weight in the middle of two codes may go either way at float32, and then all behind it differ a little.
    assert found == pytest.approx(best, rel=0.05, abs=1e-6 * np.trace(w.T @ h @ w))
    if bits > 3:
        assert np.mean(np.abs(np.asarray(dense(q)) - wanted) > 1e-3) < 0.1


@pytest.mark.parametrize("bits, group_size", [(3, 32), (4, None)])
def test_better_than_rounding(bits, group_size):
    """On correlated inputs, in every order, also on a grid that least squares shrank."""
    w, x = weights(96, 40), inputs(96, rows=400)
    h = moment(x)
    rounded = layer_error(w, RTN(bits=bits, group_size=group_size).quantize(jnp.asarray(w)).materialize(), h)
    for options in ({}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"clip": "mse"}):
        q = compress(GPTQ(bits=bits, group_size=group_size, **options), w, statistics(x))
        assert layer_error(w, dense(q), h) < 0.75 * rounded, options


def test_uncorrelated_inputs_are_rounded_to_nearest():
    """Nothing can be repaired: the codes are those of RTN."""
    w = weights(32, 8)
    stats = InputStats(count=jnp.float32(1), outer_sum=jnp.diag(jnp.linspace(0.5, 4, 32)))
    for group_size in (None, 8):
        q = compress(GPTQ(bits=4, group_size=group_size), w, stats)
        np.testing.assert_array_equal(q.codes, RTN(bits=4, group_size=group_size).quantize(jnp.asarray(w)).codes)


def test_dead_inputs_do_no_harm():
    """Weights of inputs that are always zero are taken as zero, and the others come out as without them."""
    x = inputs(16)
    x[:, [2, 9]] = 0
    w = weights(16, 6)
    w[[2, 9]] = 1e4  # would ruin the scale
    q = dense(compress(GPTQ(bits=4, group_size=None), w, statistics(x)))
    np.testing.assert_array_equal(q[jnp.array([2, 9])], 0)
    live = [i for i in range(16) if i not in (2, 9)]
    h = moment(x)[np.ix_(live, live)]
    assert layer_error(w[live], np.asarray(q)[live], h) < 0.02 * layer_error(w[live], 0 * w[live], h)


def test_fewer_rows_than_inputs():
    w, x = weights(64, 8), inputs(64, rows=8)
    q = dense(compress(GPTQ(bits=4, group_size=16, damping=0.0), w, statistics(x)))
    assert np.isfinite(q).all()
    assert layer_error(w, q, moment(x)) < layer_error(
        w, RTN(bits=4, group_size=16).quantize(w).materialize(), moment(x)
    )


def test_stacked_layers_have_their_own_statistics():
    w = jnp.stack([weights(32, 8, seed) for seed in range(3)])
    x = np.stack([inputs(32, seed=seed) for seed in range(3)])
    stats = InputStats(count=jnp.full(3, 128.0), outer_sum=jnp.swapaxes(x, -1, -2) @ x)
    q = compress(GPTQ(bits=3, group_size=8), w, stats)
    assert isinstance(q, Quantized) and q.shape == (3, 32, 8)
    for i in range(3):
        alone = compress(GPTQ(bits=3, group_size=8), w[i], jax.tree.map(lambda s, i=i: s[i], stats))
        assert np.asarray(alone.codes).tobytes() == np.asarray(q.codes[i]).tobytes()


def test_gradients_reach_the_scales():
    """The leaf trains like any other: scales get the gradient of the dense weight, codes none."""
    w, x = weights(16, 4), inputs(16)
    q = compress(GPTQ(bits=4, group_size=8), w, statistics(x))
    trainable, frozen = ej.partition({"kernel": q})

    def loss(trainable):
        return ej.lift(lambda p: jnp.square(x @ p["kernel"]).sum())(ej.combine(trainable, frozen))

    gradient = jax.grad(loss)(trainable)["kernel"].scales
    step = 1e-3
    for g, o in ((0, 0), (1, 3)):
        moved = [
            trainable["kernel"].replace(scales=q.scales.astype(jnp.float32).at[g, o].add(d)) for d in (step, -step)
        ]
        numeric = (loss({"kernel": moved[0]}) - loss({"kernel": moved[1]})) / (2 * step)
        assert float(gradient[g, o]) == pytest.approx(float(numeric), rel=0.02, abs=0.5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 9}, "bits=9: choose 1 to 8"),
        ({"damping": -1.0}, "damping=-1.0: a fraction of the Hessian's mean diagonal, 0 or more"),
        ({"group_size": 0}, "group_size=0: a positive number, or None"),
        ({"clip": "some"}, "clip='some': choose 'absmax', 'full' or 'mse'"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8' is no floating dtype"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**fields)


def test_errors_name_the_leaf():
    params = {"up": {"kernel": jnp.ones((48, 8))}}
    with pytest.raises(CalibrationError, match=r"up/kernel: GPTQ needs \['second_moment'\] of its inputs: pass stats="):
        ej.quantize_params(params, GPTQ(group_size=16))
    stats = {"up": {"kernel": statistics(inputs(48))}}
    with pytest.raises(LeafError, match=r"up/kernel \[48, 8\]: group_size=32 does not divide its 48 inputs: choose"):
        ej.quantize_params(params, GPTQ(group_size=32), stats=stats)
    only_norm = ej.calibrate(lambda p, x: x @ p["up"]["kernel"], params, [inputs(48)], needs=("norm",))
    with pytest.raises(CalibrationError, match="these statistics lack 'second_moment'"):
        ej.quantize_params(params, GPTQ(group_size=16), stats=only_norm)
