"""Curation against sorting in NumPy: every mode, galleries of several blocks, orders that must not matter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.distill import curate, query_counts


def embeddings(seed, queries, rows, d=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(queries, d)).astype(np.float32), rng.normal(size=(rows, d)).astype(np.float32)


def cosines(q, g):
    q, g = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (q, g))
    return q @ g.T


def in_turn(q, g, n):
    """Queries one after the other, each with its whole ranking."""
    rankings = [list(np.argsort(-row, kind="stable")) for row in cosines(q, g)]
    chosen = []
    while len(chosen) < n:
        ranking = rankings[len(chosen) % len(q)]
        chosen.append(next(i for i in ranking if i not in chosen))
    return chosen


cases = st.tuples(st.integers(0, 99), st.integers(1, 7), st.integers(1, 40), st.integers(1, 50), st.data())


@settings(max_examples=8)
@given(cases)
def test_modes_are_sorting(case):
    seed, queries, rows, block, data = case
    n = data.draw(st.integers(1, rows))
    q, g = embeddings(seed, queries, rows)
    best = np.argsort(-cosines(q, g).max(0), kind="stable")[:n]
    assert curate(q, g, n, mode="best_matches", block=block).tolist() == best.tolist()
    assert curate(q, g, n, block=block).tolist() == in_turn(q, g, n)


def test_every_query_has_its_share_of_different_rows():
    q, g = embeddings(0, 6, 100)
    q[1:4] = q[0]  # the same wishes: what one has taken, the others do not get
    chosen = np.asarray(curate(q, g, 45, block=16))
    assert chosen.dtype == np.int32 and len(set(chosen.tolist())) == 45
    by_query = [chosen[i::6] for i in range(6)]
    assert sorted(len(own) for own in by_query) == [7, 7, 7, 8, 8, 8]
    near = cosines(q[:1], g)[0][np.concatenate(by_query[:4])]
    others = np.setdiff1d(np.arange(100), chosen)
    assert near.min() > cosines(q[:1], g)[0][others].max() - 0.7  # refilled from further down, not at random


@pytest.mark.parametrize("mode", ["best_matches", "query_balanced"])
def test_order_of_the_gallery_does_not_matter(mode):
    q, g = embeddings(1, 5, 60)
    order = np.random.default_rng(2).permutation(60)
    plain = np.asarray(curate(q, g, 17, mode=mode, block=13))
    moved = order[np.asarray(curate(q, g[order], 17, mode=mode, block=13))]
    np.testing.assert_array_equal(plain, moved)
    np.testing.assert_array_equal(plain, curate(3 * q, g * np.linspace(1, 9, 60)[:, None], 17, mode=mode))


def test_equal_rows_are_taken_in_order():
    g = np.ones((9, 3), np.float32)
    for mode in ("best_matches", "query_balanced"):
        assert curate(g[:2], g, 5, mode=mode, block=2).tolist() == [0, 1, 2, 3, 4]


def test_random_is_of_the_key_alone():
    q, g = embeddings(0, 2, 50)
    draw = [curate(q, g, 20, mode="random", key=jax.random.key(seed)).tolist() for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2] and len(set(draw[0])) == 20 and max(draw[0]) < 50


def test_a_file_is_read_in_blocks(tmp_path):
    q, g = embeddings(3, 4, 70)
    np.save(tmp_path / "gallery.npy", g)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    assert curate(q, mapped, 9, block=32).tolist() == curate(q, g, 9).tolist()
    traced = jax.jit(lambda q, g: curate(q, g, 9, block=32))
    assert traced(q, g).tolist() == curate(q, g, 9).tolist()


def test_counts_show_a_collapse():
    q, g = embeddings(4, 3, 200)
    crowd = np.concatenate([g, q[:1] + 0.01 * np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)])
    best = query_counts(q, crowd[np.asarray(curate(q, crowd, 30, mode="best_matches"))])
    even = query_counts(q, crowd[np.asarray(curate(q, crowd, 30))])
    wanted = np.bincount(cosines(q, crowd[np.asarray(curate(q, crowd, 30))]).argmax(0), minlength=3)
    np.testing.assert_array_equal(even, wanted)
    assert int(best[0]) >= 25 > int(even[0]) and int(best.sum()) == int(even.sum()) == 30


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 0}, "curate: n=0 of a gallery [8, 4]: choose 1 to 8"),
        ({"n": 9}, "curate: n=9 of a gallery [8, 4]: choose 1 to 8"),
        ({"mode": "random"}, "curate: mode='random' draws rows: pass a key"),
        ({"mode": "nearest"}, "curate: mode='nearest': choose 'random', 'best_matches' or 'query_balanced'"),
        ({"queries": jnp.zeros((2, 3))}, "curate: queries [2, 3] and gallery [8, 4]: give at least one query"),
        ({"queries": jnp.zeros((0, 4))}, "curate: queries [0, 4] and gallery [8, 4]: give at least one query"),
    ],
)
def test_what_cannot_be_chosen(options, text):
    q, g = embeddings(0, 2, 8)
    with pytest.raises(ValueError, match=re.escape(text)):
        curate(**({"queries": q, "gallery": g, "n": 3} | options))
