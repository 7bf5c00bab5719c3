"""CQ: codes against a search by brute force, codebooks against plain k-means, bytes, and what is refused."""

import dataclasses

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from effjax.errors import ConfigError
from effjax.kv import CQ, Coder
from effjax.kv.coding import fit, pack_codes, unpack_codes

encode = jax.jit(lambda method, x, books: method.encode(x, books), static_argnums=0)
decode = jax.jit(lambda method, coded, books: method.decode(coded, books), static_argnums=0)


def there_and_back(coder, x):
    return decode(coder.coding, encode(coder.coding, x, coder.tables), coder.tables)


def vectors(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def distances(x, books):
    """Squared, float64 `[*L, heads, slots, groups, entries]`."""
    heads, groups, _, channels = books.shape
    parts = x.astype(np.float64).reshape(*x.shape[:-1], groups, channels)
    books = np.asarray(books, np.float64)
    return ((parts[..., None, :] - books[:, None]) ** 2).sum(-1)


@settings(max_examples=6)
@given(
    lead=st.sampled_from([(), (2,), (2, 3)]),
    heads=st.integers(1, 3),
    slots=st.integers(1, 9),
    groups=st.integers(1, 4),
    channels=st.sampled_from([1, 2, 3, 5]),
    bits=st.sampled_from([1, 2, 3, 5, 8, 9, 10]),
    seed=st.integers(0, 99),
)
def test_codes_are_those_of_the_nearest_centres(lead, heads, slots, groups, channels, bits, seed):
    x = vectors((*lead, heads, slots, groups * channels), seed) + 30
    books = (vectors((heads, groups, 2**bits, channels), seed + 1) + 30).astype(np.float16)
    method = CQ(channels=channels, bits=bits)
    coded = encode(method, jnp.asarray(x), jnp.asarray(books))
    codes = np.asarray(unpack_codes(coded.tokens["codes"], bits, groups)).astype(int)
    away = distances(x, books)
    chosen = np.take_along_axis(away, codes[..., None], -1)[..., 0]
    assert (chosen <= away.min(-1) + 1e-4).all()
    width = -(-groups * bits // 8) if bits <= 8 else 2 * groups
    assert coded.nbytes == int(np.prod((*lead, heads, slots))) * width
    back = np.asarray(decode(method, coded, jnp.asarray(books)))
    assert back.shape == x.shape and back.dtype == np.float32
    np.testing.assert_allclose(((back - x) ** 2).sum(-1), chosen.sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 3, 8, 10])
def test_packing_there_and_back(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 13))
    packed = pack_codes(jnp.asarray(codes), bits)
    assert packed.dtype == (jnp.uint8 if bits <= 8 else jnp.uint16)
    np.testing.assert_array_equal(unpack_codes(packed, bits, 13), codes)


def test_centres_decode_to_themselves():
    books = jnp.asarray(vectors((2, 3, 16, 4)), jnp.float16)
    codes = np.random.default_rng(0).integers(0, 16, (2, 50, 3))
    x = np.take_along_axis(np.asarray(books)[:, None], codes[..., None, None], axis=3)[..., 0, :]
    x = jnp.asarray(x.reshape(2, 50, 12), jnp.float32)
    method = CQ(channels=4, bits=4)
    np.testing.assert_array_equal(decode(method, encode(method, x, books), books), x)


def test_weights_by_channel_move_the_centres_of_runs():
    x, grads = jnp.asarray(vectors((2, 200, 8))), jnp.asarray(vectors((2, 200, 8), 1))
    for channels in (1, 4):
        method = CQ(channels=channels, bits=3)
        books = method.learn(x, grads)
        others = dataclasses.replace(method, by_channel=True).learn(x, grads)
        assert np.array_equal(books, others) is (channels == 1)
        np.testing.assert_array_equal(  # derivatives that agree over a run leave nothing to choose
            dataclasses.replace(method, by_channel=True).learn(x, jnp.ones_like(x)), method.learn(x, jnp.ones_like(x))
        )


@pytest.mark.parametrize("fisher", [True, False])
def test_each_group_is_clustered_for_itself(fisher):
    """Changing the points or gradients of one head and run changes that codebook alone."""
    x, grads = vectors((2, 200, 8)), vectors((2, 200, 8), 1)
    method = CQ(channels=4, bits=3, fisher=fisher)
    plain = np.asarray(method.learn(jnp.asarray(x), jnp.asarray(grads), key=jax.random.key(0)))
    assert plain.shape == (2, 2, 8, 4) and plain.dtype == np.float16
    for changed in (x, grads):
        before = changed.copy()
        changed[1, :, :4] += vectors((200, 4), 2)
        after = np.asarray(method.learn(jnp.asarray(x), jnp.asarray(grads), key=jax.random.key(0)))
        changed[:] = before
        same = (plain == after).all(axis=(2, 3))
        weighed = fisher or changed is x
        np.testing.assert_array_equal(same, [[True, True], [not weighed, True]])


def test_weights_are_the_squared_norms_of_the_gradients_of_the_run():
    """A run of two separate clouds and one centre each side: gradients pull the centre of the mixed cloud."""
    x = np.zeros((1, 4, 2), np.float32)
    x[0, :, 0] = [0, 1, 100, 100]
    grads = np.zeros((1, 4, 2), np.float32)
    grads[0, 0] = [3, 4]  # weight 25
    grads[0, 1] = [0, 5]  # weight 25
    grads[0, 2:] = 1
    books = CQ(channels=2, bits=1, table_dtype="float32").learn(jnp.asarray(x), jnp.asarray(grads))
    np.testing.assert_allclose(sorted(np.asarray(books)[0, 0, :, 0]), [0.5, 100], atol=1e-4)
    grads[0, 1] = [0, 5 * np.sqrt(3)]  # three times the weight
    books = CQ(channels=2, bits=1, table_dtype="float32").learn(jnp.asarray(x), jnp.asarray(grads) * 1e-25)
    np.testing.assert_allclose(sorted(np.asarray(books)[0, 0, :, 0]), [0.75, 100], atol=1e-4)


def test_fisher_lowers_the_weighted_error_and_raises_the_plain_one():
    x, grads = vectors((1, 2000, 4)), vectors((1, 2000, 4), 1) * np.exp(vectors((1, 2000, 1), 2))
    errors = {}
    for fisher in (True, False):
        coder = fit(CQ(channels=4, bits=4, fisher=fisher), jnp.asarray(x), jnp.asarray(grads), key=jax.random.key(0))
        away = ((np.asarray(there_and_back(coder, jnp.asarray(x))) - x) ** 2).sum(-1)
        errors[fisher] = (away.mean(), (away * (grads**2).sum(-1)).mean())
    assert errors[True][1] < errors[False][1] and errors[True][0] > errors[False][0]


def test_coupled_channels_cost_less_error_at_equal_bits():
    """Channels that depend on each other: the reason for the method. Independent ones gain next to nothing."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((1, 1000, 1))
    x = jnp.asarray(common + 0.2 * rng.standard_normal((1, 1000, 8)), jnp.float32)

    def error(channels, bits):
        coder = fit(CQ(channels=channels, bits=bits, fisher=False), x, key=jax.random.key(0))
        return float(jnp.mean(jnp.square(there_and_back(coder, x) - x)))

    errors = [error(1, 1), error(2, 2), error(4, 4), error(8, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4


def test_bytes_and_bits_to_the_byte():
    x = jnp.asarray(vectors((2, 300, 16)))
    coder = fit(CQ(channels=8, bits=8, fisher=False), x)
    assert coder.nbytes == 2 * 2 * 256 * 8 * 2  # heads, groups, centres, channels, float16
    assert coder.encode(x).nbytes == 2 * 300 * 2
    shape = (4, 2, 1000, 16)
    assert coder.bits_per_channel(shape, tables=False) == 1.0
    assert coder.bits_per_channel(shape) == 1.0 + 8 * coder.nbytes / np.prod(shape)
    assert jax.eval_shape(coder.encode, jax.ShapeDtypeStruct(shape, jnp.bfloat16)).nbytes == 4 * 2 * 1000 * 2


def test_under_jit_vmap_and_eval_shape():
    x = jnp.asarray(vectors((3, 2, 40, 8)))
    method = CQ(channels=2, bits=4, fisher=False)
    coder = fit(method, x[0], key=jax.random.key(0))
    assert isinstance(jax.tree.map(lambda y: y, coder), Coder) and hash(method) == hash(dataclasses.replace(method))
    expected = coder.encode(x)
    chex.assert_trees_all_equal(jax.jit(lambda c, x: c.encode(x))(coder, x), expected)
    chex.assert_trees_all_equal(jax.vmap(coder.encode)(x), expected)
    chex.assert_trees_all_equal(jax.jit(lambda c, y: c.decode(y))(coder, expected), coder.decode(expected))
    shapes = jax.eval_shape(method.learn, jax.ShapeDtypeStruct((2, 5000, 8), jnp.float32))
    assert shapes.shape == coder.tables.shape and shapes.dtype == jnp.float16
    many = jax.vmap(lambda y: method.learn(y, key=jax.random.key(0)))(x)  # layers at once
    chex.assert_trees_all_close(many[0], coder.tables)
    chex.assert_trees_all_equal(method.learn(x[0], key=jax.random.key(0)), coder.tables)


def test_slots_move_with_their_codes():
    x = jnp.asarray(vectors((2, 40, 8)))
    coder = fit(CQ(channels=4, bits=3, fisher=False), x)
    slots = jnp.asarray([[3, 1, 39], [0, 7, 7]])
    moved = coder.decode(coder.encode(x).take(slots))
    chex.assert_trees_all_equal(moved, jnp.take_along_axis(coder.decode(coder.encode(x)), slots[..., None], 1))


@settings(max_examples=15)
@given(head_dim=st.integers(1, 24), channels=st.integers(1, 24))
def test_channels_that_do_not_divide_are_refused(head_dim, channels):
    method = CQ(channels=channels, bits=1, fisher=False, iterations=1)
    assume(head_dim % channels)
    for run in (lambda x: method.learn(x), lambda x: method.encode(x, jnp.zeros((1, 1, 2, channels)))):
        with pytest.raises(ConfigError, match=f"channels={channels} does not divide head_dim {head_dim}; choose"):
            run(jnp.zeros((1, 4, head_dim)))


def test_refused():
    x = jnp.zeros((2, 10, 8))
    with pytest.raises(ConfigError, match="CQ-8c8b: needs the gradients .*capture_kv, or write fisher=False"):
        CQ().learn(x)
    with pytest.raises(ConfigError, match=r"CQ-8c8b: gradients have shape \(2, 9, 8\), the vectors \(2, 10, 8\)"):
        CQ().learn(x, x[:, :9])
    with pytest.raises(ConfigError, match=r"learns from \[kv_heads, tokens, head_dim\], found shape \(10, 8\)"):
        CQ().learn(x[0], x[0])
    with pytest.raises(ConfigError, match=r"need codebooks \(2, 1, 256, 8\), found \(1, 1, 256, 8\)"):
        CQ().encode(x, jnp.zeros((1, 1, 256, 8)))
    for fields, message in (
        ({"bits": 11}, "bits=11: choose 1 to 10"),
        ({"bits": 0}, "bits=0: choose 1 to 10"),
        ({"channels": 0}, "channels=0: choose a whole number of at least 1"),
        ({"channels": 2.0}, "channels=2.0: choose a whole number of at least 1"),
        ({"iterations": -1}, "iterations=-1: choose a whole number of at least 0"),
        ({"table_dtype": "int8"}, "table_dtype='int8' is no floating dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            CQ(**fields)
