"""Decoding from flash equals the decoder with all weights in memory under the same masks, and holds to its budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.flash import (
    Every,
    FlashDecoder,
    apply_windowed,
    feed_forwards,
    generate_from_flash,
    load_layer,
    oracles,
    plan_memory,
    resident_params,
    write_bundles,
)
from effjax.models.decoder import DecoderApply, stack_layers
from tests.flash.small import LLAMA, OPT, make, predictors

TOKENS = np.random.default_rng(0).integers(0, OPT.vocab_size, 24)
PARAMS = {config.model_type: make(config) for config in (OPT, LLAMA)}
BUDGET = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each decoder and kind of numbers, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("flash"), {}

    def get(config, kind="float32", block=512):
        key = config.model_type, kind, block
        if key not in made:
            layers = feed_forwards(config, PARAMS[config.model_type])
            made[key] = write_bundles(folder / "-".join(map(str, key)), layers, kind=kind, block=block)
        return made[key]

    return get


def decoder(config, file, scores, **options):
    options = {"budget": BUDGET, "window": 3, "slots": 32, **options}
    return FlashDecoder(config, resident_params(PARAMS[config.model_type]), scores, file.path, **options)


def stored(config, file):
    """Parameters with the feed-forward weights that the file stands for, and without the shift in the bias."""
    params = {**PARAMS[config.model_type]}
    for i in range(config.num_hidden_layers):
        ffn = load_layer(file, i)
        mlp = {name: dict(linear) for name, linear in params[f"layers_{i}"]["mlp"].items()}
        for name in mlp:
            mlp[name]["kernel"] = jnp.asarray(getattr(ffn, name.removesuffix("_proj")), jnp.float32)
        params[f"layers_{i}"] = {**params[f"layers_{i}"], "mlp": mlp}
    return params


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=lambda c: c.model_type)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("implementation", ["cpu", "python"])
def test_logits_are_those_of_the_masked_decoder(files, config, kind, implementation):
    file, scores = files(config, kind), predictors(config)
    expected = apply_windowed(config, scores, 3)({"params": stored(config, file)}, TOKENS[None])[0]
    with decoder(config, file, scores, implementation=implementation) as flash:
        found = np.stack([flash.step(token) for token in TOKENS])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=lambda c: c.model_type)
@pytest.mark.parametrize("window", [1, 4])
def test_an_oracle_gives_the_dense_decoder(files, config, window):
    scores = oracles(feed_forwards(config, PARAMS[config.model_type]))
    dense = DecoderApply(config)({"params": PARAMS[config.model_type]}, TOKENS[None])[0]
    with decoder(config, files(config), scores, window=window) as flash:
        found = np.stack([flash.step(token) for token in TOKENS])
        shares = [t.predicted / config.intermediate_size for layers in flash.trace for t in layers]
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5)
    assert 0.05 < np.mean(shares) < 0.6


def greedy(apply, params, prompt, new):
    tokens, run = np.zeros((1, len(prompt) + new), np.int32), jax.jit(apply)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + new):  # what stands behind changes nothing before it
        tokens[0, i] = int(jnp.argmax(run({"params": params}, tokens)[0, i - 1]))
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("block", [1, 512])  # rows that are read around, and rows that are read straight
def test_greedy_tokens_are_those_of_the_masked_decoder(files, block):
    scores = predictors(OPT)
    expected = greedy(apply_windowed(OPT, scores, 3), PARAMS["opt"], TOKENS[:6], 12)
    # Rows that lie at no block need memory for what is read beside them.
    with decoder(OPT, files(OPT, block=block), scores, budget=64 << 20) as flash:
        assert generate_from_flash(flash, TOKENS[:6], max_new_tokens=12) == expected
        flash.reset()
        stop = expected.index(expected[4])
        found = generate_from_flash(flash, TOKENS[:6], max_new_tokens=12, stop_tokens=expected[4:5])
        assert found == expected[: stop + 1]


def test_counts_of_the_trace(files):
    """Counted by hand from the masks of the decoder in memory."""
    scores, seen = predictors(OPT), {}
    apply_windowed(OPT, scores, 3, see=lambda i, q, p, h: seen.update({i: np.asarray(p[0])}))(
        {"params": PARAMS["opt"]}, TOKENS[None]
    )
    with decoder(OPT, files(OPT), scores) as flash:
        for token in TOKENS:
            flash.step(token)
        stride, align = flash.file.layout.stride, flash.reader.align
        for t, layers in enumerate(flash.trace):
            for i, found in enumerate(layers):
                used, before = seen[i][t], seen[i][max(0, t - 3) : t].any(0)
                new = np.flatnonzero(used & ~before)
                assert (found.predicted, found.loaded, found.passing) == (used.sum(), len(new), 0)
                assert found.resident == seen[i][max(0, t - 2) : t + 1].any(0).sum()
                assert found.reads.requests == len(new) - (np.diff(new) == 1).sum()
                assert found.reads.bytes == len(new) * stride and stride % align == 0
                assert min(found.attend, found.manage, found.read, found.compute) >= 0
        np.testing.assert_array_equal(flash.resident(1), seen[1][-3:].any(0))
        flash.reset()
        assert not flash.resident(1).any() and flash.trace == []


@pytest.mark.parametrize("capacity", [0, 5, (70, 9)])
def test_a_full_cache_reads_and_computes_what_it_cannot_keep(files, capacity):
    scores = oracles(feed_forwards(LLAMA, PARAMS["llama"]))
    dense = DecoderApply(LLAMA)({"params": PARAMS["llama"]}, TOKENS[None])[0]
    with decoder(LLAMA, files(LLAMA), scores, capacity=capacity, passing=4) as flash:
        found = np.stack([flash.step(token) for token in TOKENS])
        assert sum(t.passing for layers in flash.trace for t in layers) > 50
        assert all(t.resident <= flash.memory.capacity[i] for layers in flash.trace for i, t in enumerate(layers))
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5)


def test_reading_densely_is_a_predictor_that_names_all(files):
    """The baselines of a measurement: nothing, or half of the neurons, in memory."""
    dense = DecoderApply(OPT)({"params": PARAMS["opt"]}, TOKENS[None])[0]
    for capacity, read in ((0, 70), (35, 35)):
        with decoder(OPT, files(OPT), [Every(neurons=70)] * 2, capacity=capacity, window=10**6) as flash:
            found = np.stack([flash.step(token) for token in TOKENS])
            assert all(t.loaded + t.passing == read and t.reads.requests <= 2 for t in flash.trace[-1])
        np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5)


def test_the_budget_is_reckoned_before_anything_is_taken(files):
    params, scores, file = resident_params(PARAMS["opt"]), predictors(OPT), files(OPT)
    plan = plan_memory(OPT, params, scores, file, budget=BUDGET, slots=32)
    assert plan.total == sum(plan.terms.values()) <= BUDGET and plan.capacity == (70, 70)
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    assert plan.terms["resident weights"] == weights
    assert plan.terms["key-value cache"] >= 2 * 2 * 32 * 24 * 4
    abstract = jax.eval_shape(lambda: (params, scores))
    assert plan_memory(OPT, *abstract, file, budget=BUDGET, slots=32) == plan
    less = plan.total - 40 * 2 * file.layout.stride
    small = plan_memory(OPT, params, scores, file, budget=less, slots=32)
    assert 25 <= small.capacity[0] < 35 and less - 1100 < small.total <= less
    with pytest.raises(ConfigError) as error:
        decoder(OPT, file, scores, budget=60_000)
    message = str(error.value)
    assert f"resident weights {weights:,} + predictors" in message and "more than the budget of 60,000" in message
    with pytest.raises(ConfigError, match=r"capacity=\(71, 71\): one for each of 2 layers, from 0 to 70"):
        decoder(OPT, file, scores, capacity=71)


def test_what_does_not_fit_is_told(files):
    with pytest.raises(
        ConfigError, match=r"holds \(layers, neurons, width, gate\) = \(2, 70, 24, False\) and the decoder"
    ):
        decoder(LLAMA, files(OPT), predictors(LLAMA))
    silu = dataclasses.replace(LLAMA, hidden_act="silu", relu_shift=0.0)
    with pytest.raises(ConfigError, match="hidden_act='silu'; only ReLUs"):
        decoder(silu, files(LLAMA), predictors(LLAMA))
    with pytest.raises(ConfigError, match="exchange it by effjax.sparsity.relufy"):
        feed_forwards(silu, PARAMS["llama"])
    with pytest.raises(ConfigError, match="window=0"):
        decoder(OPT, files(OPT), predictors(OPT), window=0)
    with decoder(OPT, files(OPT), predictors(OPT), slots=4) as flash:
        with pytest.raises(ConfigError, match=r"a prompt of 3 tokens and 3 new ones: .* \(4 are left\)"):
            generate_from_flash(flash, [1, 2, 3], max_new_tokens=3)
        assert len(generate_from_flash(flash, [1, 2, 3], max_new_tokens=2)) == 2
        with pytest.raises(ConfigError, match="the text has its 4 tokens"):
            flash.step(1)


def test_stacked_layers_are_taken_apart():
    params = PARAMS["llama"]
    stacked = stack_layers(params)
    for a, b in zip(feed_forwards(LLAMA, params), feed_forwards(LLAMA, stacked), strict=True):
        np.testing.assert_array_equal(a.up, b.up)
    assert jax.tree.structure(resident_params(stacked)) == jax.tree.structure(resident_params(params))
