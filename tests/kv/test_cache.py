"""The cache itself: sizes, bytes, writing and resizing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache, init_cache, resize, write_layer
from tests.kv.caches import filled

SIZES = {"layers": 2, "batch": 3, "kv_heads": 2, "slots": 8, "head_dim": 4}


def test_empty_cache():
    cache = init_cache(**SIZES, dtype=jnp.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 8, 4) and cache.k.dtype == jnp.bfloat16
    assert cache.positions.shape == cache.scores.shape == (2, 3, 2, 8) and cache.length.shape == (2, 3, 2)
    assert (cache.positions == -1).all() and (cache.length == 0).all() and (cache.offset == 0).all()
    rows = 2 * 3 * 2
    assert cache.nbytes == rows * 8 * (4 * 2 * 2 + 4 + 4) + rows * 4 + 3 * 4
    assert jax.eval_shape(lambda: cache).nbytes == cache.nbytes
    assert isinstance(jax.tree.map(lambda x: x, cache), KVCache)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one(name):
    with pytest.raises(ConfigError, match=f"init_cache: {name} must be at least 1, found 0"):
        init_cache(**(SIZES | {name: 0}))


def test_ragged_writes_append_per_row_and_head():
    """Rows and heads that were filled unevenly each go on behind their own last token."""
    cache = init_cache(**SIZES).replace(length=jnp.array([[[0, 3], [5, 2], [7, 8]]] * 2, jnp.int32))
    new = jnp.arange(3 * 2 * 2 * 4, dtype=jnp.float32).reshape(3, 2, 2, 4) + 1
    positions = jnp.array([[10, 11], [20, 21], [30, 31]], jnp.int32)
    after = jax.jit(write_layer)(cache, jnp.int32(1), new, -new, positions, jnp.array([2, 1, 2], jnp.int32))
    chex.assert_trees_all_equal(after.k[0], cache.k[0])
    np.testing.assert_array_equal(after.length[1], [[2, 5], [6, 3], [8, 8]])
    expected = np.full((3, 2, 8), -1)
    expected[0, 0, :2] = expected[0, 1, 3:5] = [10, 11]
    expected[1, 0, 5] = expected[1, 1, 2] = 20
    expected[2, 0, 7] = 30  # the second token has no slot left, and head 1 has none at all
    np.testing.assert_array_equal(after.positions[1], expected)
    np.testing.assert_array_equal(after.k[1, 0, 1, 3:5], new[0, 1])
    np.testing.assert_array_equal(after.v[1, 1, 0, 5], -new[1, 0, 0])
    assert float(jnp.abs(after.k[1, 1, 0, 6:]).sum()) == 0, "padding is not written"


def test_resize_and_back():
    cache = filled([[3, 1], [2, 5]], slots=6)
    wide = jax.jit(resize, static_argnames="slots")(cache, slots=9)
    assert wide.slots == 9 and wide.nbytes > cache.nbytes
    chex.assert_trees_all_equal(wide.length, cache.length)
    assert (wide.positions[..., 6:] == -1).all()
    chex.assert_trees_all_equal(resize(wide, 6), cache)
    narrow = resize(cache, 5)
    assert narrow.nbytes < cache.nbytes
    chex.assert_trees_all_equal(narrow, jax.tree.map(lambda x: x, resize(wide, 5)))


def test_resize_does_not_drop_tokens():
    cache = filled([[3, 1], [2, 5]], slots=6)
    with pytest.raises(ConfigError, match="5 slots are filled and 4 would drop tokens; write slots=5 or more"):
        resize(cache, 4)
    with pytest.raises(ConfigError, match="slots must be at least 1, found 0"):
        resize(cache, 0)
    assert jax.eval_shape(lambda c: resize(c, 4), cache).slots == 4, "lengths unknown: the caller answers for it"
    assert int(jax.jit(lambda c: resize(c, 4))(cache).length.max()) == 4
