"""Look-ups in one table: rows of the hashed matrix they stand for, features that read elsewhere, gradients, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.arrays import Hashed
from effjax.sketch import feature_seeds, robe_lookup, unified_lookup
from tests.sketch.oracles import mix

TABLE = jax.random.normal(jax.random.key(0), (53,))
ROWS = jax.random.normal(jax.random.key(1), (29, 4))


@pytest.mark.parametrize("block", [1, 4])
def test_robe_reads_the_rows_of_the_hashed_matrix(block):
    seed = jnp.uint32(9)
    whole = Hashed(table=TABLE, seed=seed, in_features=40, out_features=6, block=block).materialize()
    ids = jnp.array([[3, 39, 3], [0, 7, 20]])
    got = jax.jit(lambda ids: robe_lookup(TABLE, seed, ids, features=6, block=block))(ids)
    np.testing.assert_array_equal(got, whole[ids])


def unified_oracle(seeds, ids, lookups):
    """One look-up after the other, in Python's integers."""
    out = np.zeros((*ids.shape, lookups * 4), np.float32)
    for place in np.ndindex(*ids.shape):
        key = mix(int(seeds[place[-1]]) ^ mix(int(ids[place])))
        found = [np.asarray(ROWS)[mix(key + i) % 29] for i in range(lookups)]
        out[place] = np.concatenate(found)
    return out


def test_unified_look_ups():
    seeds = feature_seeds(3, 2)
    ids = jnp.array([[5, 5], [8, 2**31 - 1], [0, 1]])
    got = jax.jit(lambda table: unified_lookup(table, seeds, ids, lookups=3))(ROWS)
    np.testing.assert_array_equal(got, unified_oracle(np.asarray(seeds), np.asarray(ids), 3))
    assert not np.array_equal(got[0, 0], got[0, 1])  # one value of two features is read from two places


def test_features_hash_apart():
    """Ids that collide for one feature do not for another: the collisions of features are independent."""
    ids = jnp.arange(300)[:, None] * jnp.ones(2, jnp.int32)
    table = jnp.arange(64.0)[:, None]
    rows = np.asarray(unified_lookup(table, feature_seeds(0, 2), ids))[..., 0]
    same = rows[:, None] == rows[None]
    pairs = np.triu_indices(300, 1)
    first, second = same[..., 0][pairs], same[..., 1][pairs]
    assert 0.5 < first.mean() * 64 < 1.5 and 0.5 < second.mean() * 64 < 1.5
    assert (first & second).mean() * 64**2 < 2
    assert len(set(np.asarray(feature_seeds(0, 1000)).tolist())) == 1000
    assert set(np.asarray(feature_seeds(0, 9)).tolist()).isdisjoint(np.asarray(feature_seeds(1, 9)).tolist())


def test_gradients_touch_only_what_is_read():
    seeds = feature_seeds(1, 1)
    ids = jnp.array([[4], [4], [6]])
    gradient = jax.grad(lambda t: (unified_lookup(t, seeds, ids) * jnp.array([1.0, 2.0, 4.0])[:, None, None]).sum())(
        ROWS
    )
    want = np.zeros((29, 4))
    for value, share in ((4, 3.0), (6, 4.0)):
        want[mix(mix(int(seeds[0]) ^ mix(value))) % 29] += share
    np.testing.assert_array_equal(gradient, want)
    read = jax.grad(lambda t: robe_lookup(t, seeds[0], ids[:, 0], features=6, block=3).sum())(TABLE)
    assert 1 <= np.count_nonzero(read) <= 12


def test_what_is_refused():
    with pytest.raises(ValueError, match="^block=54: from 1 to the 53 slots of the table$"):
        robe_lookup(TABLE, jnp.uint32(0), jnp.arange(2), features=8, block=54)
    with pytest.raises(ValueError, match=r"^ids \[4, 3\]: the last axis holds one id for each of \[2\] seeds$"):
        unified_lookup(ROWS, feature_seeds(0, 2), jnp.zeros((4, 3), jnp.int32))
    with pytest.raises(ValueError, match="^lookups=0: at least 1$"):
        unified_lookup(ROWS, feature_seeds(0, 2), jnp.zeros((4, 2), jnp.int32), lookups=0)
