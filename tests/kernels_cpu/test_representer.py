"""Queries of a Representer Sketch: the native kernel against its definition and against numpy, every variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.hashing.integers import MultiplyShift
from effjax.hashing.lsh import PStable, SignProjections
from effjax.ops.representer import representer_query
from kernels_cpu import _native, representer, variants

RUNNABLE = variants.runnable("representer", representer.VARIANTS)
# batch, in, dim, hashes, rows, buckets, outputs, groups: sizes of one, odd ones, and more rows than a block holds.
SHAPES = [
    (1, 1, 1, 1, 1, 2, 1, 1),
    (3, 7, 5, 3, 9, 5, 1, 3),
    (2, 13, 8, 2, 130, 16, 1, 2),
    (4, 6, 17, 1, 67, 3, 3, 1),
    (1, 64, 11, 4, 198, 100, 10, 3),
    (0, 5, 2, 1, 4, 2, 1, 1),
]


def operands(shape, signs, seed=0):
    """Numbers of few bits, whose products are exact in any order of summation: no code depends on rounding."""
    batch, n, dim, hashes, rows, buckets, outputs, _ = shape
    rng = np.random.default_rng(seed)

    def few(*shape):
        return rng.integers(-16, 17, shape).astype(np.float32) / 8

    x, a, directions = few(batch, n), few(n, dim), few(dim, hashes, rows)
    offsets = rng.integers(0, 8, (hashes, rows)).astype(np.float32) / 8 * (not signs)
    multiplier = rng.integers(0, 2**32, (rows, hashes, 2), dtype=np.uint32)
    addend = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    return x, a, directions, offsets, multiplier, addend, few(rows, buckets, outputs)


def oracle(x, a, directions, offsets, multiplier, addend, counts, signs, groups):
    """Loops over whole numbers of Python."""
    rows, buckets, outputs = counts.shape
    at = np.einsum("nd,dkr->nkr", x.astype(np.float64) @ a, directions)
    codes = (at >= 0).astype(np.int64) if signs else np.floor(at + offsets).astype(np.int64)
    out = np.zeros((len(x), groups, outputs))
    for i in range(len(x)):
        for r in range(rows):
            key = int(addend[r, 0]) + (int(addend[r, 1]) << 32)
            for k in range(codes.shape[1]):
                whole = int(multiplier[r, k, 0]) + (int(multiplier[r, k, 1]) << 32)
                key += whole * (int(codes[i, k, r]) % 2**32)
            cell = ((key % 2**64) >> 32) * buckets >> 32
            out[i, r // (rows // groups)] += counts[r, cell] / (rows // groups)
    return out


@pytest.mark.parametrize("signs", [False, True], ids=["intervals", "signs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, signs):
    arrays, groups = operands(shape, signs), shape[-1]
    want = oracle(*arrays, signs, groups)
    for variant in RUNNABLE:
        got = representer.group_means(*map(jnp.asarray, arrays), signs=signs, groups=groups, variant=variant)
        assert got.shape == want.shape and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


def functions(arrays, buckets, signs):
    rehash = MultiplyShift(multiplier=jnp.asarray(arrays[4]), addend=jnp.asarray(arrays[5]))
    directions = jnp.asarray(arrays[2])
    if signs:
        return SignProjections(directions=directions, rehash=rehash, buckets=buckets)
    return PStable(directions=directions, offsets=jnp.asarray(arrays[3]), rehash=rehash, width=1.0, buckets=buckets)


@pytest.mark.parametrize("signs", [False, True], ids=["intervals", "signs"])
@pytest.mark.parametrize("shape", SHAPES[1:5:2], ids=str)
def test_the_operation_is_its_reference(shape, signs):
    arrays, groups = operands(shape, signs, seed=1), shape[-1]
    lsh = functions(arrays, shape[5], signs)
    x, a, counts = (jnp.asarray(arrays[i]) for i in (0, 1, 6))
    want = np.median(oracle(*arrays, signs, groups), axis=1)

    def run(x, counts, implementation=None):
        return representer_query(x, a, lsh, counts, groups=groups, implementation=implementation)

    for implementation in (None, "reference", "cpu"):
        np.testing.assert_allclose(run(x, counts, implementation), want, atol=1e-5)
    jitted = jax.jit(run)
    assert "EffjaxRepresenter" in jitted.lower(x, counts).as_text()
    np.testing.assert_allclose(jitted(x, counts), want, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(run, in_axes=(0, None))(x, counts), want, atol=1e-5)
    assert jax.eval_shape(run, x[None], counts).shape == (1, *want.shape)
    got, expected = (jax.grad(lambda c, i=i: jnp.square(run(x, c, i)).sum())(counts) for i in (None, "reference"))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    step = counts.at[0, 0, 0].add(0.5), counts.at[0, 0, 0].add(-0.5)
    difference = jnp.square(run(x, step[0])).sum() - jnp.square(run(x, step[1])).sum()
    if groups == 1:
        np.testing.assert_allclose(got[0, 0, 0], difference, atol=1e-4)


def test_gaussian_inputs_agree_but_for_codes_at_a_boundary():
    lsh = PStable.make(jax.random.key(0), dim=8, rows=300, hashes=2, width=1.5, buckets=16)
    keys = jax.random.split(jax.random.key(1), 3)
    x, a = jax.random.normal(keys[0], (200, 33)), jax.random.normal(keys[1], (33, 8))
    counts = jax.random.normal(keys[2], (300, 16, 1))
    native, plain = (representer_query(x, a, lsh, counts, implementation=i) for i in ("cpu", "reference"))
    # One of 300 cells differs where a code does, in a few of 200 queries.
    difference = np.abs(np.asarray(native - plain))
    assert (difference > 1e-5).mean() < 0.05 and difference.max() < 0.1


def test_undefined_and_huge_inputs_have_the_same_cells():
    lsh = PStable.make(jax.random.key(0), dim=1, rows=40, hashes=2, width=1.0, buckets=7)
    x = jnp.array([[jnp.nan], [jnp.inf], [-jnp.inf], [1e30], [-1e30], [3e9]])
    counts = jax.random.normal(jax.random.key(1), (40, 7, 2))
    native, plain = (
        representer_query(x, jnp.ones((1, 1)), lsh, counts, implementation=i) for i in ("cpu", "reference")
    )
    np.testing.assert_allclose(native, plain, atol=1e-6)


def test_bad_input_is_named():
    lsh = PStable.make(jax.random.key(0), dim=2, rows=6, hashes=1, width=1.0, buckets=4)
    x, a, counts = jnp.ones((5, 3)), jnp.ones((3, 2)), jnp.ones((6, 4, 1))
    with pytest.raises(ValueError, match=r"counts \(6, 5, 1\) do not fit hashes of 2 channels to 6 rows of 4 buckets"):
        representer_query(x, a, lsh, jnp.ones((6, 5, 1)))
    with pytest.raises(ValueError, match="^groups=4 does not divide 6 rows"):
        representer_query(x, a, lsh, counts, groups=4)
    with pytest.raises(ValueError, match="implementation='gpu': choose 'reference' or 'cpu'"):
        representer_query(x, a, lsh, counts, implementation="gpu")
    with pytest.raises(ValueError, match="hash_functions must rehash"):
        representer_query(x, a, SignProjections.make(jax.random.key(0), dim=2, rows=6, hashes=2), counts)
    wide = PStable.make(jax.random.key(0), dim=257, rows=6, hashes=1, width=1.0, buckets=4)
    with pytest.raises(ValueError, match="holds 256 projected channels, found 257"):
        representer_query(x, jnp.ones((3, 257)), wide, counts, implementation="cpu")
    assert representer_query(x, jnp.ones((3, 257)), wide, counts).shape == (5, 1)
    with pytest.raises(ValueError, match="unknown variant 'avx9'"):
        representer.group_means(*map(jnp.asarray, operands(SHAPES[0], False)), signs=False, groups=1, variant="avx9")


def test_the_handler_itself_refuses_wrong_shapes():
    arrays = [jnp.asarray(a) for a in operands(SHAPES[1], False)]
    result = jax.ShapeDtypeStruct((3, 3, 1), jnp.float32)
    kernel = jax.ffi.ffi_call(_native.NATIVE.target("EffjaxRepresenter"), result)
    for i in range(len(arrays)):
        wrong = arrays[:i] + [arrays[i][..., :-1]] + arrays[i + 1 :]
        with pytest.raises(jax.errors.JaxRuntimeError, match="representer"):
            jax.block_until_ready(kernel(*wrong, signs=np.int64(0), variant=np.int64(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="variant 9 does not run"):
        jax.block_until_ready(kernel(*arrays, signs=np.int64(0), variant=np.int64(9)))
