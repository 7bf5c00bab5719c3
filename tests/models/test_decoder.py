"""The decoder against itself: cached, scanned, rematerialised, in bfloat16, and differentiated."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.models.config import DecoderConfig, RopeScaling
from effjax.models.decoder import Decoder, DecoderApply, new_cache, stack_layers, unstack_layers

CONFIG = DecoderConfig(
    model_type="qwen3",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    sliding_window=5,
)
TOKENS = np.random.Generator(np.random.PCG64(1)).integers(0, 50, (2, 10), np.int32)


def jitted(config):
    """One compiled program instead of one for every operation."""
    return jax.jit(DecoderApply(config))


@functools.cache
def initial_params():
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    return jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, params)  # attention that really chooses


def make(scan_layers=False, **changes):
    """Configuration and parameters; the same weights whether scanned or not."""
    config = dataclasses.replace(CONFIG, **changes)
    params = dict(initial_params())
    if scan_layers:
        config, params = dataclasses.replace(config, scan_layers=True), stack_layers(params)
    return config, params


def test_parameter_names_and_shapes():
    config, params = make()
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in jax.tree.leaves_with_path(params)
    }
    layer = {
        "attention_norm/scale": (32,),
        "attention/q_proj/kernel": (32, 40),
        "attention/k_proj/kernel": (32, 20),
        "attention/v_proj/kernel": (32, 20),
        "attention/o_proj/kernel": (40, 32),
        "attention/q_norm/scale": (10,),
        "attention/k_norm/scale": (10,),
        "mlp_norm/scale": (32,),
        "mlp/gate_proj/kernel": (32, 48),
        "mlp/up_proj/kernel": (32, 48),
        "mlp/down_proj/kernel": (48, 32),
    }
    expected = {f"layers_{i}/{name}": shape for i in range(3) for name, shape in layer.items()}
    expected |= {"embed/embedding": (50, 32), "final_norm/scale": (32,), "lm_head/kernel": (32, 50)}
    assert shapes == expected
    scanned = dataclasses.replace(config, scan_layers=True)
    made = jax.eval_shape(Decoder(scanned).init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(made, stack_layers(params))
    chex.assert_trees_all_equal(unstack_layers(stack_layers(params)), params)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_equals_unrolled(remat):
    config, params = make()
    scanned, stacked = make(scan_layers=True, remat=remat)

    def loss(config):
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(DecoderApply(config)({"params": p}, TOKENS) ** 2)))

    one, grad_one = loss(config)(params)
    two, grad_two = loss(scanned)(stacked)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    chex.assert_tree_all_finite(grad_one)
    chex.assert_trees_all_close(stack_layers(grad_one), grad_two, atol=1e-6, rtol=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grad_one)), "a parameter that nothing depends on"


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("window", [None, 4])
def test_ragged_prefill_and_decode_equal_the_whole_text(scan_layers, window):
    config, params = make(scan_layers, sliding_window=window)
    whole = jitted(config)({"params": params}, TOKENS)
    step = jitted(config)
    cache, at = new_cache(config, batch=2, slots=12), np.array([5, 2])
    padded = np.where(np.arange(6) < at[:, None], TOKENS[:, :6], 49)
    logits, cache = step({"params": params}, padded, cache=cache, lengths=jnp.asarray(at))
    for row in range(2):
        np.testing.assert_allclose(logits[row, : at[row]], whole[row, : at[row]], atol=2e-5)
    while at.max() < 10:  # the shorter row takes two tokens a step, the longer one
        counts = np.array([1, 2])
        chunk = np.stack([TOKENS[0, [at[0], 0]], TOKENS[1, at[1] : at[1] + 2]])
        logits, cache = step({"params": params}, chunk, cache=cache, lengths=jnp.asarray(counts))
        np.testing.assert_allclose(logits[0, 0], whole[0, at[0]], atol=2e-5)
        np.testing.assert_allclose(logits[1], whole[1, at[1] : at[1] + 2], atol=2e-5)
        at += counts
    lengths = np.broadcast_to(at[None, :, None], cache.length.shape)
    np.testing.assert_array_equal(cache.length, lengths)
    np.testing.assert_array_equal(cache.offset, at)
    slots = np.arange(12)
    np.testing.assert_array_equal(cache.positions, np.where(slots < lengths[..., None], slots, -1))
    # every query spreads a weight of one for each query head of the group
    np.testing.assert_allclose(cache.scores.sum(-1), 2 * lengths, rtol=1e-5)


def test_row_of_length_zero_leaves_its_cache():
    config, params = make()
    apply = jitted(config)
    _, cache = apply({"params": params}, TOKENS[:, :4], cache=new_cache(config, batch=2, slots=8))
    _, after = apply({"params": params}, TOKENS[:, 4:5], cache=cache, lengths=jnp.array([1, 0]))
    row = lambda cache: jax.tree.map(lambda x: x[:, 1] if x.ndim > 1 else x[1], cache)  # noqa: E731
    chex.assert_trees_all_equal(row(cache), row(after))
    np.testing.assert_array_equal(after.offset, [5, 4])


def test_full_cache_drops_what_does_not_fit():
    config, params = make()
    _, cache = jitted(config)({"params": params}, TOKENS[:, :6], cache=new_cache(config, batch=2, slots=4))
    np.testing.assert_array_equal(cache.length, np.full((3, 2, 2), 4))
    np.testing.assert_array_equal(cache.positions[0, 0, 0], np.arange(4))
    np.testing.assert_array_equal(cache.offset, [6, 6])


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_donated_decode_step_copies_no_cache(scan_layers):
    """Temporaries stay at a few layers' slices however many layers there are, and the cache is aliased whole."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=6, scan_layers=scan_layers)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    cache = jax.eval_shape(lambda: new_cache(config, batch=2, slots=2048))
    step = jax.jit(DecoderApply(config), donate_argnames="cache")
    memory = step.lower({"params": params}, jnp.asarray(TOKENS[:, :1]), cache=cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 2, (memory.temp_size_in_bytes, cache.nbytes)


def test_bfloat16():
    config, params = make()
    exact = jitted(config)({"params": params}, TOKENS)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits, cache = jitted(config)(
        {"params": halves}, TOKENS, cache=new_cache(config, batch=2, slots=10, dtype=jnp.bfloat16)
    )
    assert logits.dtype == jnp.float32 and cache.k.dtype == jnp.bfloat16
    error = jnp.sqrt(jnp.mean((logits - exact) ** 2) / jnp.mean(exact**2))
    assert 0 < error < 0.05
    computed = jitted(dataclasses.replace(config, dtype="float32"))({"params": halves}, TOKENS)
    assert jnp.mean((computed - exact) ** 2) < jnp.mean((logits - exact) ** 2), "float32 on bfloat16 weights"


def test_strict_dtypes_and_ranks():
    """Nothing in the model relies on implicit promotion."""
    config, params = make()
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        logits, _ = jitted(config)({"params": halves}, jnp.asarray(TOKENS), cache=new_cache(config, batch=2, slots=10))
    chex.assert_tree_all_finite(logits)


def test_dynamic_scaling_is_per_row():
    """A padded row gives the same logits next to a longer one, although the base depends on the length."""
    scaling = RopeScaling(rope_type="dynamic", factor=2.0)
    config, params = make(sliding_window=None, rope_scaling=scaling, max_position_embeddings=4)
    apply = jitted(config)
    together, _ = apply(
        {"params": params}, TOKENS, cache=new_cache(config, batch=2, slots=11), lengths=jnp.array([6, 10])
    )
    alone = apply({"params": params}, TOKENS[:1, :6])
    np.testing.assert_allclose(together[0, :6], alone[0], atol=2e-5)
    fixed = jitted(dataclasses.replace(config, rope_scaling=None))({"params": params}, TOKENS[:1, :6])
    assert jnp.abs(alone - fixed).max() > 1e-2, "the text is long enough to stretch"


def test_vmap_over_parameters():
    config, params = make()
    pair = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    both = jax.jit(jax.vmap(lambda p: DecoderApply(config)({"params": p}, TOKENS)))(pair)
    np.testing.assert_allclose(both[0], jitted(config)({"params": params}, TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "kwargs", "message"),
    [
        (TOKENS[0], {}, r"tokens must be \[batch, length\], found shape \(10,\)"),
        (TOKENS, {"lengths": jnp.array([1])}, r"lengths must be \[batch\] = \[2\], found shape \(1,\)"),
        (TOKENS, {"cache": new_cache(CONFIG, batch=3, slots=16)}, r"\[3, 3, 2, 16, 10\].* need \[3, 2, 2, 16, 10\]"),
    ],
)
def test_shapes_that_do_not_fit(tokens, kwargs, message):
    config, params = make()
    with pytest.raises(ConfigError, match=message):
        DecoderApply(config)({"params": params}, tokens, **kwargs)


def test_stacking_needs_layers():
    _, params = make()
    del params["layers_1"]
    with pytest.raises(ConfigError, match="without a gap"):
        stack_layers(params)
    with pytest.raises(ConfigError, match="expected layers/"):
        unstack_layers(params)
