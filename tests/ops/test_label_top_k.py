"""The best of the retrieved labels: both implementations against loops of Python, derivatives, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.hashing.integers import MultiplyShift
from effjax.hashing.lsh import SignProjections
from effjax.ops import label_top_k
from tests.ops.label_oracle import laid_out, operands, top_k

# batch, d, hashes, tables, labels, fallback, k; the last: 4,096 buckets, nearly all of them empty.
SHAPES = [(1, 1, 1, 1, 1, 0, 1), (3, 7, 4, 3, 90, 2, 3), (2, 16, 2, 5, 70, 0, 70), (4, 5, 12, 2, 40, 3, 4)]


def case(shape, seed=1):
    h, directions, buckets, weights, bias, fallback = operands(shape, seed)
    ids, offsets = map(jnp.asarray, laid_out(buckets))
    lsh = SignProjections(directions=jnp.asarray(directions), rehash=None, buckets=offsets.shape[1] - 1)
    want = top_k(h, directions, buckets, weights, bias, fallback, shape[-1])

    def run(h, weights, bias, implementation=None, k=shape[-1]):
        return label_top_k(
            h, lsh, ids, offsets, weights, bias, jnp.asarray(fallback), k=k, implementation=implementation
        )

    return run, tuple(map(jnp.asarray, (h, weights, bias))), want


def agree(got, want):
    np.testing.assert_allclose(got.values, want[0], atol=1e-5)
    np.testing.assert_array_equal(got.labels, want[1])
    np.testing.assert_array_equal(got.scored, want[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_implementations_match_the_oracle(shape):
    run, arrays, want = case(shape)
    for implementation in (None, "reference", "cpu"):
        agree(run(*arrays, implementation), want)
    jitted = jax.jit(run)
    assert "EffjaxLabelTopK" in jitted.lower(*arrays).as_text()
    agree(jitted(*arrays), want)
    agree(jax.tree.map(lambda x: x[0], jax.vmap(run, (0, None, None))(arrays[0][None], *arrays[1:])), want)
    shapes = jax.eval_shape(run, arrays[0][None], *arrays[1:])
    assert [s.shape for s in shapes] == [(1, *w.shape) for w in want]


@pytest.mark.parametrize("implementation", [None, "reference", "cpu"])
def test_derivatives_are_those_of_the_logits_found(implementation):
    run, arrays, want = case((3, 7, 4, 3, 90, 2, 3))
    found = want[1]
    assert (found >= 0).all()
    scale = np.random.default_rng(0).normal(size=found.shape)

    def loss(h, weights, bias):
        return jnp.sum(jnp.square(run(h, weights, bias, implementation).values) * scale)

    def of_the_same_labels(h, weights, bias):
        return jnp.sum(jnp.square(jnp.einsum("nd,nkd->nk", h, weights[found]) + bias[found]) * scale)

    got = jax.grad(loss, (0, 1, 2))(*arrays)
    expected = jax.grad(of_the_same_labels, (0, 1, 2))(*arrays)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    # By a difference too: a step so small that no code and no rank changes.
    step, direction = 1e-3, jax.random.normal(jax.random.key(0), arrays[1].shape)
    ahead, behind = (loss(arrays[0], arrays[1] + s * step * direction, arrays[2]) for s in (1, -1))
    np.testing.assert_allclose((ahead - behind) / (2 * step), jnp.vdot(got[1], direction), rtol=0.01, atol=0.05)


def test_missing_labels_have_no_derivative():
    run, arrays, want = case((4, 5, 12, 2, 40, 0, 4))
    assert (want[1] < 0).any()
    g = jax.grad(lambda h: jnp.where(jnp.isfinite(run(h, *arrays[1:]).values), run(h, *arrays[1:]).values, 0).sum())
    assert bool(jnp.isfinite(g(arrays[0])).all())


def test_bfloat16_rows_are_widened():
    run, (h, weights, bias), want = case(SHAPES[1])
    for implementation in ("reference", "cpu"):
        agree(run(h, weights.astype(jnp.bfloat16), bias, implementation), want)
    g = jax.grad(lambda w: run(h, w, bias).values.sum())(weights.astype(jnp.bfloat16))
    assert g.dtype == jnp.bfloat16


def test_gaussian_queries_agree_but_for_codes_at_a_boundary():
    keys = jax.random.split(jax.random.key(0), 4)
    weights, bias = jax.random.normal(keys[0], (2000, 33)), jax.random.normal(keys[1], (2000,))
    lsh = SignProjections.make(keys[2], dim=34, rows=5, hashes=6)
    codes = np.asarray(lsh(jnp.concatenate([weights, bias[:, None]], 1)))
    ids = np.argsort(codes.T, 1, kind="stable").astype(np.int32)
    offsets = np.stack([np.searchsorted(np.sort(c), np.arange(65)) for c in codes.T]).astype(np.int32)
    h = jax.random.normal(keys[3], (100, 33))
    args = (h, lsh, jnp.asarray(ids), jnp.asarray(offsets), weights, bias, jnp.arange(3))
    native, plain = (label_top_k(*args, k=5, implementation=i) for i in ("cpu", "reference"))
    same = np.asarray(native.scored == plain.scored)
    assert same.mean() > 0.95
    np.testing.assert_array_equal(native.labels[same], plain.labels[same])
    np.testing.assert_allclose(native.values[same], plain.values[same], atol=1e-4)


def test_bad_input_is_named():
    run, (h, weights, bias), _ = case(SHAPES[1])
    with pytest.raises(ValueError, match=r"weights \(89, 7\), bias \(90,\) .* do not fit 3 tables of 16 buckets"):
        run(h, weights[1:], bias)
    with pytest.raises(ValueError, match="hashes of 8 channels, one more than h has"):
        run(h[:, 1:], weights, bias)
    with pytest.raises(ValueError, match="k=91: choose 1 to 90"):
        run(h, weights, bias, k=91)
    with pytest.raises(ValueError, match="weights float16: store them as float32 or bfloat16"):
        run(h, weights.astype(jnp.float16), bias)
    with pytest.raises(ValueError, match="implementation='gpu': choose 'reference' or 'cpu'"):
        run(h, weights, bias, "gpu")
    rehash = MultiplyShift.make(jax.random.key(0), functions=(1,), words=1)
    lsh = SignProjections(directions=jnp.ones((2, 1, 1)), rehash=rehash, buckets=2)
    none = jnp.zeros(0, jnp.int32)
    with pytest.raises(ValueError, match="hash_functions must not rehash; make SignProjections without buckets"):
        label_top_k(jnp.ones((1, 1)), lsh, none[None], none[None], jnp.ones((0, 1)), jnp.ones(0), none, k=1)
    wide = SignProjections.make(jax.random.key(0), dim=2, rows=2049, hashes=1)
    many = jnp.zeros((2049, 1), jnp.int32), jnp.tile(jnp.array([0, 1, 1]), (2049, 1))
    args = (jnp.ones((1, 1)), wide, *many, jnp.ones((1, 1)), jnp.zeros(1), none)
    with pytest.raises(ValueError, match="found 1 in each of 2049"):
        label_top_k(*args, k=1, implementation="cpu")
    assert int(jax.jit(lambda: label_top_k(*args, k=1))().scored[0]) in (0, 1)
