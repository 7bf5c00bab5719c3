"""Nested random subspaces: projections against an oracle, what collapses and spreads, and the server's mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.sketch import Subspace, average
from tests.sketch.oracles import mix

SHAPE = (12, 8)
SIZES = {ratio: Subspace(shape=SHAPE, ratio=ratio, seed=5) for ratio in (1, 2, 4, 16)}
TABLE = jax.random.normal(jax.random.key(0), SHAPE)


def design(space):
    """Row `cell` holds the sign with which a cell reads its weight; in Python's integers."""
    cells = space.shape[0] * space.shape[1]
    matrix = np.zeros((cells, space.slots))
    for cell in range(cells):
        if space.whole:
            matrix[cell, cell] = 1
        else:
            hashed = mix(mix(space.seed) ^ mix(cell))
            matrix[cell, hashed % space.slots] = 1 - 2 * (mix(hashed + 0x9E3779B9) >> 31)
    return matrix


@pytest.mark.parametrize("ratio", SIZES)
def test_projection(ratio):
    """The nearest table of the space, its rows, and the number of stored weights."""
    space, matrix = SIZES[ratio], design(SIZES[ratio])
    assert space.slots == 96 // ratio
    w = space.compress(TABLE)
    nearest = matrix @ np.linalg.pinv(matrix) @ np.asarray(TABLE).ravel()
    np.testing.assert_allclose(space.expand(w).ravel(), nearest, atol=1e-6)
    ids = jnp.array([[3, 11], [0, 3]])
    np.testing.assert_array_equal(jax.jit(space.lookup)(w, ids), space.expand(w)[ids])
    read = jax.grad(lambda w: space.lookup(w, ids[:1]).sum())(w)
    chosen = np.zeros(SHAPE)
    chosen[[3, 11]] = 1
    np.testing.assert_allclose(read, matrix.T @ chosen.ravel(), atol=1e-6)


@pytest.mark.parametrize(("large", "small"), [(1, 4), (2, 4), (2, 16), (4, 4)])
def test_nested_spaces(large, small):
    """A larger device's vector collapses to what the smaller one would have got; a smaller one's is held exactly."""
    large, small = SIZES[large], SIZES[small]
    assert small.nests_in(large) and (large.nests_in(small) == (large == small))
    w = large.compress(TABLE)
    collapsed = large.collapse(w, small)
    np.testing.assert_allclose(collapsed, small.compress(large.expand(w)), atol=1e-6)
    np.testing.assert_allclose(collapsed, small.compress(TABLE), atol=1e-5)  # projections onto nested spaces commute
    np.testing.assert_array_equal(large.expand(small.spread(collapsed, large)), small.expand(collapsed))


@given(st.integers(1, 300), st.floats(1, 50), st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_what_nests(rows, ratio, seed):
    """Exactly where the sizes divide; every other pair is refused by what relies on it."""
    large, small = (Subspace(shape=(rows, 4), ratio=r, seed=seed) for r in (1.5, ratio))
    assert small.nests_in(large) == (large.slots % small.slots == 0 or large.whole)
    if not small.nests_in(large):
        with pytest.raises(ValueError, match="is not nested in"):
            small.spread(jnp.zeros(small.slots), large)


@pytest.mark.parametrize("server", [1, 2])
@pytest.mark.parametrize("delta", [False, True])
def test_average(server, delta):
    """Against expanded tables; devices that change nothing leave the table of a delta as it was."""
    space, spaces, shares = SIZES[server], [SIZES[2], SIZES[4], SIZES[16]], [1.0, 2.0, 5.0]
    start = space.compress(TABLE)
    sent = [space.collapse(start, own) for own in spaces]
    trained = [w + i for i, w in enumerate(sent)]
    new = average(start, trained, spaces, shares, space=space, delta=delta)
    dense = [own.expand(w) for own, w in zip(spaces, trained, strict=True)]
    before = [own.expand(w) for own, w in zip(spaces, sent, strict=True)]
    want = sum(share / 8 * (now - was * delta) for share, now, was in zip(shares, dense, before, strict=True))
    np.testing.assert_allclose(space.expand(new), want + delta * space.expand(start), atol=1e-5)
    idle = average(start, sent, spaces, shares, space=space, delta=delta)
    unchanged = np.abs(idle - start).max()
    assert unchanged < 1e-6 if delta else unchanged > 0.1  # the plain mean forgets what small devices cannot hold


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shape": (3, 0)}, r"shape=\(3, 0\): rows and features, at least 1 each and fewer than 2\^32 cells"),
        ({"shape": (3, 3), "ratio": 0.5}, "ratio=0.5: at least 1 cell a stored weight"),
        ({"shape": (3, 3), "seed": -1}, "seed=-1: from 0 to 4294967295"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        Subspace(**options)


def test_what_is_refused():
    odd, other = Subspace(shape=SHAPE, ratio=3, seed=5), Subspace(shape=SHAPE, ratio=4, seed=6)
    with pytest.raises(ValueError, match=r"\(32 weights\) is not nested in .* \(48\): give both one shape and seed"):
        SIZES[2].collapse(jnp.zeros(48), odd)
    with pytest.raises(ValueError, match="is not nested in"):
        other.spread(jnp.zeros(24), SIZES[2])
    with pytest.raises(ValueError, match=r"^the table is \[3, 8\], the space one of tables \[12, 8\]$"):
        SIZES[2].compress(jnp.zeros((3, 8)))
    with pytest.raises(ValueError, match="^1 vectors, 1 spaces, 2 weights: give one of each a device$"):
        average(jnp.zeros(48), [jnp.zeros(24)], [SIZES[4]], [1, 2], space=SIZES[2])
