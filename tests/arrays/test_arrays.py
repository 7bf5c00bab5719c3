"""Slices of rows and columns, views, indexing: what the array types offer beside `materialize`."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax import arrays
from effjax.arrays import fold, unfold
from effjax.errors import LeafError
from tests.common.cases import ARRAYS, STACKED, dense, example, mesh_of

MATRICES = [case for case in ARRAYS if case.dims is None]
matrices = pytest.mark.parametrize("case", MATRICES, ids=lambda case: case.name)


@matrices
def test_tiles_are_slices(case):
    """The tiles that an array can be cut into, decoded one by one in a loop, are the rows of the dense matrix."""
    w = example(case)
    n = w.shape[-2]
    sizes = [size for size in (w.row_multiple, 2 * w.row_multiple) if n % size == 0 and size < n]
    if isinstance(
        w, arrays.LowRank | arrays.Sum | arrays.RowScaled | arrays.Permuted | arrays.Prepared | arrays.UserTables
    ):
        assert w.tiles(n) is None  # multiplied by its parts instead
        return
    if case.inputs == 61 or case.name == "codebook odd":
        assert not sizes  # nothing is promised where whole bytes do not divide the inputs
        return
    assert sizes

    @partial(jax.jit, static_argnums=1)
    def decoded(w, size):
        pieces, decode = w.tiles(size)
        return jax.lax.map(decode, pieces)

    for size in sizes:
        got = decoded(w, size)
        assert (got.shape, got.dtype) == ((n // size, size, w.shape[-1]), w.dtype)
        np.testing.assert_allclose(got.reshape(w.shape), dense(case), rtol=1e-6, atol=1e-6)


@matrices
def test_columns_are_columns(case):
    ids = np.array([3, 0, 31, 3])
    picked = example(case).columns(jnp.asarray(ids))
    if isinstance(example(case), arrays.Hashed | arrays.Shared):
        assert picked is None  # the hash of a column is its position
        return
    assert picked.shape == (case.inputs, 4)
    assert picked.nbytes < example(case).nbytes
    np.testing.assert_allclose(picked.materialize(), dense(case)[:, ids], rtol=1e-6, atol=1e-6)


def test_index_needs_a_stacked_dimension():
    with pytest.raises(IndexError, match="has no leading stacked dimension to index; call .materialize"):
        example(ARRAYS[0])[0]
    assert len([example(ARRAYS[0], (STACKED,))[i] for i in range(STACKED)]) == STACKED


def test_groups_and_tables_that_do_not_fit():
    codes = jnp.zeros((6, 4), jnp.uint8)
    with pytest.raises(LeafError, match="^4 groups of scales do not divide 6 inputs"):
        arrays.Quantized.from_codes(codes, jnp.ones((4, 4)), None, bits=4, dtype=jnp.float32)
    with pytest.raises(LeafError, match="^bits=9: a Quantized array holds 1 to 8 bits"):
        arrays.Quantized.from_codes(codes, jnp.ones((1, 4)), None, bits=9, dtype=jnp.float32)
    with pytest.raises(LeafError, match=r"^zero points \[2, 4\] for scales \[1, 4\]: one a scale is needed"):
        arrays.Quantized.from_codes(codes, jnp.ones((1, 4)), jnp.ones((2, 4)), bits=4, dtype=jnp.float32)
    with pytest.raises(LeafError, match="^a codebook of 1 entries: 2 to 256 can be indexed with 1 to 8 bits"):
        arrays.Codebook.from_codes(codes, jnp.ones((1, 1, 1)), dtype=jnp.float32)
    with pytest.raises(LeafError, match="^a codebook of 257 entries"):
        arrays.Codebook.from_codes(codes, jnp.ones((1, 1, 257)), dtype=jnp.float32)
    with pytest.raises(LeafError, match="^1x3 tables do not divide a matrix of 6x4"):
        arrays.Codebook.from_codes(codes, jnp.ones((1, 3, 4)), dtype=jnp.float32)
    with pytest.raises(LeafError, match="^4 groups of scales do not divide 6 inputs"):
        arrays.Codebook.from_codes(codes, jnp.ones((1, 1, 4)), jnp.ones((4, 4)), dtype=jnp.float32)
    with pytest.raises(LeafError, match="^4:4 is no pattern: 1 <= n < m <= 256"):
        arrays.NMSparse.from_dense(jnp.ones((8, 4)), jnp.ones((8, 4), bool), n=4, m=4)
    with pytest.raises(LeafError, match="^a 2:4 pattern needs inputs divisible by 4, the matrix has 6"):
        arrays.NMSparse.from_dense(jnp.ones((6, 4)), jnp.ones((6, 4), bool), n=2, m=4)


def test_real_zero_points():
    """`scales * (code - zero)` with fractions for zero points: kept as they are, in whole and in tiles."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (32, 5))
    scales, zeros = (rng.standard_normal((4, 5)).astype(np.float32) for _ in range(2))
    w = arrays.Quantized.from_codes(
        jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(zeros), bits=3, dtype=jnp.float32
    )
    want = np.repeat(scales, 8, axis=0) * (codes - np.repeat(zeros, 8, axis=0))
    np.testing.assert_allclose(w.materialize(), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(w.zero_points(), zeros)
    assert w.nbytes == 12 * 5 + 2 * 4 * 4 * 5
    assert w.replace(zeros=w.zeros.astype(jnp.float16)).zero_points().dtype == jnp.float32
    assert ej.partition({"w": w})[0]["w"].zeros is w.zeros  # trainable, as scales are


def test_codebook_values():
    """`scales[s] * tables[g, c, code]`, looked up entry by entry."""
    rng = np.random.default_rng(0)
    codes, tables = rng.integers(0, 5, (12, 6)), rng.standard_normal((2, 3, 5)).astype(np.float32)
    scales = rng.standard_normal((4, 6)).astype(np.float32)
    w = arrays.Codebook.from_codes(jnp.asarray(codes), jnp.asarray(tables), jnp.asarray(scales), dtype=jnp.float32)
    want = [[scales[i // 3, o] * tables[i // 6, o // 2, codes[i, o]] for o in range(6)] for i in range(12)]
    np.testing.assert_allclose(w.materialize(), want, rtol=1e-6)


def test_n_of_m_fills_up_with_zeros():
    """A mask that keeps fewer than n of a group: its other slots are zeros."""
    w = jnp.arange(1.0, 9.0).reshape(8, 1)
    mask = jnp.array([0, 0, 1, 0, 0, 0, 0, 0], bool).reshape(8, 1)
    packed = arrays.NMSparse.from_dense(w, mask, n=2, m=4)
    np.testing.assert_array_equal(packed.materialize(), jnp.where(mask, w, 0))
    assert packed.nbytes == 4 * 4 + 1


def test_hash_is_spread_and_signed():
    """Slots are used evenly and signs are balanced, for whatever seed."""
    w = arrays.Hashed(
        table=jnp.ones(64), seed=jnp.uint32(11), in_features=256, out_features=64, block=1, dtype=np.dtype("float32")
    )
    assert abs(float(w.materialize().mean())) < 0.03
    counts = np.bincount(np.asarray(arrays.hashed.slots_and_signs(w.seed, jnp.arange(256), 64, 64, 1)[0]).ravel())
    assert counts.size == 64 and counts.min() > 180 and counts.max() < 340  # 256 expected, deviation 16
    slots = np.asarray(arrays.hashed.slots_and_signs(w.seed, jnp.arange(256), 64, 64, 8)[0]).reshape(256, 8, 8)
    np.testing.assert_array_equal((slots[..., 1:] - slots[..., :-1]) % 64, 1)


@st.composite
def axes(draw):
    """A shape with stacked dimensions in front and any split of the others into inputs and outputs."""
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    trailing = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    order = draw(st.permutations(range(-len(trailing), 0)))
    n_in = draw(st.integers(1, len(trailing) - 1))
    return (*lead, *trailing), tuple(order[:n_in]), tuple(order[n_in:])


@given(axes())
@settings(max_examples=25)
def test_fold_and_unfold_are_inverse(example):
    shape, in_axes, out_axes = example
    w = np.arange(float(np.prod(shape)), dtype=np.float32).reshape(shape)

    @jax.jit  # one program an example is quicker than one an operation
    def there_and_back(w):
        folded = fold(w, in_axes, out_axes)
        out = folded.shape[-1]
        one = arrays.LowRank(a=folded, b=jnp.broadcast_to(jnp.eye(out), (*folded.shape[:-2], out, out)))
        seen = unfold(one, shape, in_axes, out_axes)
        assert seen.shape == shape
        return folded, seen.materialize()

    folded, seen = there_and_back(w)
    n = int(np.prod([shape[axis] for axis in in_axes]))
    assert folded.shape[-2] == n and folded.size == w.size
    split = folded.reshape(*folded.shape[:-2], *(shape[axis] for axis in (*in_axes, *out_axes)))
    lead = len(shape) - len(in_axes) - len(out_axes)
    order = (*range(lead), *(len(shape) + axis for axis in (*in_axes, *out_axes)))
    np.testing.assert_array_equal(split, np.transpose(w, order))
    np.testing.assert_array_equal(seen, w)


def test_fold_refuses_other_axes():
    text = r"^in_axes=\(-1,\) and out_axes=\(-3,\) are not the trailing axes of a weight of shape \(2, 3, 4\)"
    with pytest.raises(LeafError, match=text):
        fold(jnp.ones((2, 3, 4)), (-1,), (-3,))


def test_specs_refuse_to_cut_bytes_and_groups():
    """Four devices: the inputs are cut only between whole bytes and groups, in all fields or in none."""
    mesh = mesh_of(AxisType.Auto)

    def cut(method, n):
        w = {"w": method.quantize(jnp.ones((n, 8)))}
        specs = jax.tree.leaves(
            ej.partition_specs(w, {"w": P("tensor", None)}, mesh), is_leaf=lambda s: isinstance(s, P)
        )
        asked = ["tensor" in spec for spec in specs]
        grouped = [x.shape[-2] > 1 for x in jax.tree.leaves(w)]
        assert asked[0] == any(asked)
        assert not asked[0] or asked[0] == all(a for a, g in zip(asked, grouped, strict=True) if g)
        return asked[0]

    def rtn(bits, group_size, symmetric=True):
        return ej.quantize.RTN(bits=bits, group_size=group_size, symmetric=symmetric)

    assert cut(rtn(4, None), 16)  # two bytes a device
    assert cut(rtn(4, None), 8)  # one byte a device
    assert not cut(rtn(4, None), 4)  # half a byte
    assert not cut(rtn(3, None), 8)  # six bits
    assert cut(rtn(3, None), 32)  # three bytes
    assert not cut(rtn(3, None), 12)  # 36 bits are five bytes: nine bits
    assert cut(rtn(4, 16), 64)  # one group
    assert not cut(rtn(4, 32), 64)  # half a group
    assert not cut(rtn(4, 16, symmetric=False), 64)  # a zero point of four bits
    assert cut(rtn(4, 8, symmetric=False), 64)  # two zero points: one byte
    assert cut(ej.quantize.HQQ(bits=4, group_size=16), 64)  # real zero points are not packed
    assert not cut(ej.quantize.NF4(block_size=32), 64)
    assert cut(ej.quantize.NF4(block_size=16), 64)
    sparse = {"w": arrays.NMSparse.from_dense(jnp.ones((24, 8)), jnp.zeros((24, 8), bool), n=2, m=4)}
    two = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    assert ej.partition_specs(sparse, {"w": P("tensor")}, two)["w"].values == P(None, None)  # six groups, 3 bytes
    assert ej.partition_specs(sparse, {"w": P(None, "tensor")}, two)["w"].values == P(None, "tensor")


def test_specs_of_a_sum_agree():
    """A part that cannot be cut keeps the other whole too, with or without a mesh."""
    w = jnp.ones((24, 8))
    parts = (ej.quantize.RTN(bits=3, group_size=12).quantize(w), arrays.LowRank(a=w[:, :2], b=w[:2]))
    for mesh in (None, jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        specs = ej.partition_specs({"w": arrays.Sum(parts=parts)}, {"w": P("tensor", None)}, mesh)["w"]
        assert specs.parts[1].a == P(None, None) and specs.parts[0].codes == P(None, None)
        specs = ej.partition_specs({"w": arrays.Sum(parts=parts)}, {"w": P(None, "tensor")}, mesh)["w"]
        assert specs.parts[1].b == P(None, "tensor") and specs.parts[0].codes == P(None, "tensor")
