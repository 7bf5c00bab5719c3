"""Some neurons of an MLP natively: every variant and kind of row against numpy, and what the handlers refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.neurons import CodedRows, Neurons
from kernels_cpu import _native, sparse_mlp, variants
from kernels_cpu.choose_neurons import choose_neurons

RUNNABLE = variants.runnable("sparse_mlp", sparse_mlp.VARIANTS)
# batch, in, neurons, out, chosen: sizes of one, odd ones, more neurons than a block and than the parts hold.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 17, 50, 33, 40),
    (5, 64, 300, 96, 300),
    (2, 160, 40, 32, 7),
    (0, 32, 4, 32, 2),
    (9, 7, 9, 5, 9),
]


def rows(rng, neurons, width, kind, by_neuron):
    """What the kernel reads, and the dense numbers that it stands for."""
    dense = rng.normal(size=(neurons, width)).astype(np.float32)
    if kind in ("float32", "bfloat16"):
        stored = jnp.asarray(dense, kind)
        return stored, np.asarray(stored.astype(jnp.float32))
    codes = rng.integers(0, 2**kind, (neurons, width)).astype(np.uint8)
    length = width if by_neuron else neurons
    groups = max(g for g in (1, 2, 3) if length % g == 0 and (not by_neuron or length // g % 32 == 0))
    shape = (neurons, groups) if by_neuron else (groups, width)
    scales, zeros = rng.random(shape).astype(np.float32), rng.integers(0, 2**kind, shape).astype(np.float32)
    if by_neuron:
        wide = [np.repeat(a, width // groups, axis=1) for a in (scales, zeros)]
    else:
        wide = [np.repeat(a, neurons // groups, axis=0) for a in (scales, zeros)]
    packed = codes
    if kind == 4:
        packed = np.zeros((neurons, width // 2), np.uint8)
        for i in range(width):
            packed[:, i // 32 * 16 + i % 16] |= codes[:, i] << (4 * (i % 32 // 16))
    coded = CodedRows(
        codes=jnp.asarray(packed), scales=jnp.asarray(scales), zeros=jnp.asarray(zeros), bits=kind, by_neuron=by_neuron
    )
    return coded, wide[0] * (codes - wide[1])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", 8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_numpy(shape, kind):
    batch, n, neurons, out, k = shape
    if kind in (4, 8):
        n, out = (-(-width // 32) * 32 for width in (n, out))
    rng = np.random.default_rng(0)
    for gated, down_by_neuron in ((False, False), (True, True)):
        up, up_dense = rows(rng, neurons, n, kind, True)
        gate, gate_dense = rows(rng, neurons, n, kind, True)
        down, down_dense = rows(rng, neurons, out, kind, down_by_neuron)
        bias, gate_bias, last = (rng.normal(size=size).astype(np.float32) for size in (neurons, neurons, out))
        x = rng.normal(size=(batch, n)).astype(np.float32) / n
        chosen = rng.permutation(neurons)[:k].astype(np.int32)
        shift = 0.01 * gated
        z = x.astype(np.float64) @ up_dense.T + bias
        h = np.maximum(x @ gate_dense.T + gate_bias - shift, 0) * z if gated else np.maximum(z, 0)
        want = h[:, chosen] @ down_dense[chosen].astype(np.float64) + last
        scale = np.abs(h[:, chosen]) @ np.abs(down_dense[chosen]) + 1
        weights = Neurons(
            up=up,
            down=down,
            gate=gate if gated else None,
            up_bias=jnp.asarray(bias),
            gate_bias=jnp.asarray(gate_bias) if gated else None,
            down_bias=jnp.asarray(last),
            shift=shift,
        )
        live = np.isin(np.arange(neurons), chosen) & (h != 0).any(0)
        for variant in RUNNABLE:
            got, used = sparse_mlp.sparse_mlp(jnp.asarray(x), weights, jnp.asarray(chosen), jnp.int32(k), variant)
            assert got.shape == want.shape
            np.testing.assert_array_equal(np.asarray(used), live)
            np.testing.assert_array_less(np.abs(got - want), 1e-4 * scale)


def test_undefined_numbers_come_through():
    weights = Neurons(up=jnp.eye(2), down=jnp.eye(2))
    for variant in RUNNABLE:
        got, _ = sparse_mlp.sparse_mlp(jnp.array([[jnp.nan, 2.0]]), weights, jnp.array([0, 1]), jnp.int32(2), variant)
        assert np.isnan(got[0, 0])


def test_largest_scores_with_infinite_and_undefined_ones():
    scores = jnp.array([[-jnp.inf, 3.0, jnp.inf, -0.0, 0.0, -1e-40, jnp.nan]])
    order = [6, 2, 1, 3, 4, 5, 0]  # NaN first, as in jax.lax.top_k
    for k in range(1, 8):
        chosen, count = choose_neurons(scores, jnp.float32(-jnp.inf), k=k)
        # What is not above the threshold, even one that is everything, is not chosen.
        want = sorted(set(order[:k]) - {0})
        assert chosen[: int(count)].tolist() == want, k


def test_what_is_refused():
    weights = Neurons(up=jnp.ones((4, 3), jnp.float16), down=jnp.ones((4, 3), jnp.float16))
    with pytest.raises(ValueError, match="reads float32, bfloat16 and codes of 4 or 8 bits, found float16"):
        sparse_mlp.sparse_mlp(jnp.ones((1, 3)), weights, jnp.array([1]), jnp.int32(1))
    weights = Neurons(up=jnp.ones((4, 3)), down=jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="unknown variant 'avx9'"):
        sparse_mlp.sparse_mlp(jnp.ones((1, 3)), weights, jnp.array([1]), jnp.int32(1), "avx9")


def test_the_handlers_themselves_refuse_wrong_shapes():
    target = _native.NATIVE.target("EffjaxSparseMlp")
    results = [jax.ShapeDtypeStruct((1, 5), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.uint8)]
    call = jax.ffi.ffi_call(target, results)
    empty, static = (
        jnp.zeros((0, 0)),
        dict.fromkeys(("type", "activation", "gated", "by_neuron", "variant"), np.int64(0)) | {"shift": np.float32(0)},
    )
    x, chosen, count = jnp.ones((1, 3)), jnp.zeros(2, jnp.int32), jnp.int32(2)
    right = [x, chosen, count, jnp.ones((4, 3)), *[empty] * 5, jnp.ones((4, 5)), empty, empty]
    right += [jnp.ones(4), jnp.ones(4), jnp.ones(5)]
    assert call(*right, **static)[0].shape == (1, 5)
    for i in (0, 3, 9, 12, 13, 14):
        wrong = right[:i] + [right[i][..., :-1]] + right[i + 1 :]
        with pytest.raises(jax.errors.JaxRuntimeError, match="sparse_mlp"):
            jax.block_until_ready(call(*wrong, **static))
    for name in ("type", "activation", "variant"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="sparse_mlp"):
            jax.block_until_ready(call(*right, **static | {name: np.int64(9)}))
    short = jax.ffi.ffi_call(target, [results[0], jax.ShapeDtypeStruct((3,), jnp.uint8)])
    with pytest.raises(jax.errors.JaxRuntimeError, match="used has not a byte for every neuron"):
        jax.block_until_ready(short(*right, **static))
    results = [jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)]
    choose = jax.ffi.ffi_call(_native.NATIVE.target("EffjaxChooseNeurons"), results)
    for k, message in ((2, "no room for the union"), (0, "k=0 of 3")):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(choose(jnp.ones((1, 3)), jnp.float32(0), k=np.int64(k)))
