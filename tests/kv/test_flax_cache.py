"""Caches of Flax's own attention: read, evicted, written back, and the unmodified model goes on as if masked."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import effjax as ej
from effjax.errors import ConfigError
from effjax.kv.cache import split_layers
from effjax.kv.flax_cache import flax_attention, from_flax, to_flax

BATCH, SLOTS, HEADS, WIDTH = 2, 12, 2, 8


class Block(nn.Module):
    """What somebody else wrote: nothing of it knows of effjax."""

    @nn.compact
    def __call__(self, x, mask=None):
        attention = nn.MultiHeadDotProductAttention(HEADS, decode=True)
        return x + attention(nn.LayerNorm()(x), mask=mask, sow_weights=True)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        for _ in range(2):
            x = Block()(x, mask)
        return x


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        return blocks(Block(), x, None)[0]


def started(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.ones((BATCH, SLOTS, WIDTH)))


def inputs(count, seed=1):
    return jax.random.normal(jax.random.key(seed), (count, BATCH, 1, WIDTH))


def run(model, variables, xs, mask=None):
    """The outputs, the cache, and what slots received in all."""
    params, cache, received = variables["params"], variables["cache"], 0.0
    step = jax.jit(
        lambda v, x: model.apply(v, x, *(() if mask is None else (mask,)), mutable=["cache", "intermediates"])
    )
    outputs = []
    for x in xs:
        y, updated = step({"params": params, "cache": cache}, x)
        cache, received = updated["cache"], received + flax_attention(updated["intermediates"])
        outputs.append(y)
    return jnp.stack(outputs), cache, received


@pytest.mark.parametrize("model", [Model(), Scanned()], ids=["layers written out", "layers scanned"])
def test_reads_what_the_model_wrote(model):
    variables = started(model)
    _, cache, received = run(model, variables, inputs(5))
    kv = from_flax(cache, scores=received)
    layers = 2 if isinstance(model, Model) else 3
    assert kv.k.shape == (layers, BATCH, HEADS, SLOTS, WIDTH // HEADS)
    assert (kv.length == 5).all() and (kv.offset == 5).all()
    np.testing.assert_array_equal(kv.positions[1, 1, 0], [*range(5), *[-1] * 7])
    np.testing.assert_allclose(kv.scores.sum(-1), 5, rtol=1e-5)  # every query gives one in all
    first = jax.tree.leaves(cache)[1]  # cached_key of the first node, behind its cache_index
    np.testing.assert_array_equal(kv.k[0, 1, 0], first[1, :, 0] if layers == 2 else first[0, 1, :, 0])
    chex.assert_trees_all_equal(to_flax(kv, cache), cache)
    assert jax.eval_shape(from_flax, cache).k.shape == kv.k.shape


def test_goes_on_as_if_the_evicted_tokens_were_masked():
    """The oracle: the whole cache, with a mask over the tokens that a sink and a window leave out."""
    model, xs = Model(), inputs(9)
    variables = started(model)
    _, cache, _ = run(model, variables, xs[:6])
    method = ej.kv.SinkWindow(sinks=1, window=3)
    kv = ej.kv_evict(from_flax(cache), method, slots=7)
    small = to_flax(kv, cache)
    assert ej.nbytes(small) < 0.6 * ej.nbytes(cache)
    got, after, _ = run(model, variables | {"cache": small}, xs[6:])
    seen = np.isin(np.arange(SLOTS), [0, 3, 4, 5, 6, 7, 8])
    expected, _, _ = run(model, variables | {"cache": cache}, xs[6:], jnp.broadcast_to(seen, (BATCH, HEADS, 1, SLOTS)))
    np.testing.assert_allclose(got, expected, atol=1e-6)

    again = from_flax(after, before=kv)
    np.testing.assert_array_equal(again.positions[0, 0, 0], [0, 3, 4, 5, 6, 7, 8])
    assert (again.offset == 9).all() and (again.length == 7).all()


def test_ranks_by_the_attention_that_the_model_reports():
    model = Model()
    _, cache, received = run(model, started(model), inputs(8))
    method = ej.kv.H2O(budget=4)
    kept = ej.kv_evict(from_flax(cache, scores=received, importance=method.importance), method)
    recent = 8 - method.newest(4)
    for at in np.ndindex(2, BATCH, HEADS):
        old = np.argsort(-np.asarray(received[at][:recent]), kind="stable")[: 4 - method.newest(4)]
        assert set(np.asarray(kept.positions[at])) == {*old.tolist(), *range(recent, 8)}


def test_nnx():
    attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0), decode=True)
    attention.init_cache((BATCH, SLOTS, WIDTH))
    for x in inputs(6):
        attention(x)
    whole = nnx.clone(attention)
    cache = nnx.state(attention, nnx.Cache)
    kv = ej.kv_evict(from_flax(cache), ej.kv.SinkWindow(sinks=1, window=2), slots=5)
    nnx.update(attention, to_flax(kv, cache))
    assert attention.cached_key.shape == (BATCH, 5, HEADS, WIDTH // HEADS)
    x = inputs(1, seed=2)[0]
    got = attention(x)
    assert int(attention.cache_index[...]) == 4

    seen = jnp.isin(jnp.arange(SLOTS), jnp.array([0, 4, 5, 6]))
    np.testing.assert_allclose(got, whole(x, mask=jnp.broadcast_to(seen, (BATCH, HEADS, 1, SLOTS))), atol=1e-6)


def test_errors_say_what_to_do():
    model = Model()
    cache = started(model)["cache"]
    kv = from_flax(cache)
    with pytest.raises(ConfigError, match="no 'cached_key' among .*'a'.*give the cache collection"):
        from_flax({"a": jnp.ones(3)})
    node = cache["Block_0"]["MultiHeadDotProductAttention_0"]
    with pytest.raises(ConfigError, match="cached_key: cached_value or cache_index is not beside it"):
        from_flax({"cached_key": node["cached_key"]})
    with pytest.raises(ConfigError, match=r"cached_key: shape \(2, 2, 12, 2, 4\) .* expected \[batch, slots"):
        from_flax(node | {"cached_key": jnp.stack([node["cached_key"]] * 2)})
    longer = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1) if x.ndim else x, node)
    with pytest.raises(ConfigError, match="layers of different shapes"):
        from_flax({"a": node, "b": longer})
    with pytest.raises(ConfigError, match=r"scores of shape \(2, 12\) for slots \(2, 2, 2, 12\)"):
        from_flax(cache, scores=jnp.ones((2, 12)))
    with pytest.raises(ConfigError, match="give what to_flax wrote into this cache"):
        from_flax(cache, before=ej.kv_evict(kv, ej.kv.SinkWindow(sinks=1, window=2)))
    with pytest.raises(ConfigError, match="2 layers for a model with 1"):
        to_flax(kv, {"a": node})
    with pytest.raises(ConfigError, match="write join_layers"):
        to_flax(split_layers(kv), cache)
    with pytest.raises(ConfigError, match="different numbers of tokens, for which a Flax cache has one index"):
        to_flax(kv.replace(length=kv.length.at[0, 0, 0].set(3)), cache)
    with pytest.raises(ConfigError, match="sow_weights=True"):
        flax_attention({})
