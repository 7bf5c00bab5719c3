"""Label tables: every label in one bucket a table, what is retrieved is the union of the buckets, each label once."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.sparsity import build_tables, retrieve
from effjax.sparsity.label_tables import same_norm, slots

_build = jax.jit(build_tables, static_argnames="buckets")
_retrieve = jax.jit(retrieve, static_argnames="max_candidates")


@st.composite
def label_codes(draw):
    # A few shapes, so that programs compile once: one of everything, full buckets, buckets that are mostly empty.
    labels, tables, buckets = draw(st.sampled_from([(1, 1, 1), (37, 3, 2), (20, 5, 90)]))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    return rng.integers(0, buckets, (labels, tables)), rng.integers(0, buckets, (3, tables)), buckets


@hypothesis.settings(max_examples=15)
@hypothesis.given(label_codes())
def test_a_query_gets_the_union_of_its_buckets(case):
    codes, queries, buckets = case
    tables = _build(jnp.asarray(codes), buckets)
    labels, count = codes.shape
    ids, offsets = np.asarray(tables.ids), np.asarray(tables.offsets)
    assert tables.buckets == buckets and ids.shape == (count, labels) and offsets.shape == (count, buckets + 1)
    for t in range(count):
        assert sorted(ids[t]) == list(range(labels))
        for c in range(buckets):
            assert list(ids[t, offsets[t, c] : offsets[t, c + 1]]) == [j for j in range(labels) if codes[j, t] == c]
    most = sum(max(np.bincount(codes[:, t], minlength=buckets)) for t in range(count))
    assert tables.most() == most
    room = labels * count  # the same for all examples of a shape
    found, valid = _retrieve(tables, jnp.asarray(queries), max_candidates=room)
    assert found.shape == valid.shape == (3, room)
    for query, row, real in zip(queries, np.asarray(found), np.asarray(valid), strict=True):
        union = [j for j in range(labels) if (codes[j] == query).any()]
        assert list(row[real]) == union and (row[~real] == labels).all()
        assert sum(real) == len(union)


def test_slots_are_the_buckets_end_to_end():
    codes = np.random.default_rng(0).integers(0, 4, (50, 3))
    tables = build_tables(jnp.asarray(codes), 4)
    query = np.array([2, 0, 3])
    wanted = [j for t in range(3) for j in range(50) if codes[j, t] == query[t]]
    assert int(tables.sizes(jnp.asarray(query)).sum()) == len(wanted)
    assert slots(tables, jnp.asarray(query), jnp.arange(len(wanted))).tolist() == wanted


def test_too_few_slots_lose_the_last_tables():
    tables = build_tables(jnp.array([[0, 1], [0, 1], [1, 0]]), 2)
    ids, valid = retrieve(tables, jnp.array([[0, 0]]), max_candidates=2)
    assert ids.tolist() == [[0, 1]] and bool(valid.all())
    assert retrieve(tables, jnp.array([0, 0]), max_candidates=9)[1].sum() == 3


def test_under_jit_and_vmap():
    codes = jax.random.randint(jax.random.key(0), (30, 4), 0, 8)

    @jax.jit
    def run(codes, queries):
        return retrieve(build_tables(codes, 8), queries, max_candidates=30)

    plain = retrieve(build_tables(codes, 8), codes[:5], max_candidates=30)
    for got in (run(codes, codes[:5]), jax.vmap(lambda q: run(codes, q))(codes[:5])):
        for a, b in zip(got, plain, strict=True):
            np.testing.assert_array_equal(a, b)


def test_equal_norms_keep_products_with_a_zero_channel():
    points = jax.random.normal(jax.random.key(0), (20, 6))
    lifted = same_norm(points)
    norms = jnp.linalg.norm(points, axis=-1)
    np.testing.assert_allclose(jnp.linalg.norm(lifted, axis=-1), norms.max(), rtol=1e-6)
    np.testing.assert_array_equal(lifted[:, :-1], points)


@pytest.mark.parametrize(
    ("codes", "buckets"),
    [(jnp.zeros((0, 2), int), 3), (jnp.zeros((2, 0), int), 3), (jnp.zeros((2, 2)), 3), (jnp.zeros((2, 2), int), 0)],
)
def test_bad_codes_are_named(codes, buckets):
    with pytest.raises(ValueError, match="give integers .labels, tables. of at least one label and table"):
        build_tables(codes, buckets)


def test_bad_queries_are_named():
    tables = build_tables(jnp.zeros((2, 2), int), 1)
    for codes, most in ((jnp.zeros((4, 3), int), 5), (jnp.zeros((4, 2), int), 0)):
        with pytest.raises(ValueError, match="of 2 tables, max_candidates=.: give a code a table"):
            retrieve(tables, codes, max_candidates=most)
