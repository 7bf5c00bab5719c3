"""The compiled programs of generation: one trace a step, the cache in place and once, no dense copy of a weight."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import ConfigError
from effjax.kv.cache import init_cache, join_layers, resize, split_layers
from effjax.models.compiled_generate import GenerationStats, compile_generate, generate_text_measured, step_bytes
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.models.generate import generate

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=6,
    model_type="mistral",
    tie_word_embeddings=False,
)
APPLY = ej.lift(DecoderApply(CONFIG), on_materialize="error", limit=0)
PROMPTS = np.random.Generator(np.random.PCG64(5)).integers(0, 64, (3, 6), np.int32)
LENGTHS = np.array([6, 2, 4], np.int32)
NEW, SLOTS = 5, 11


@pytest.fixture(scope="module")
def dense():
    tree = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.asarray(PROMPTS))["params"]
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, tree)


@pytest.fixture(scope="module")
def packed(dense):
    method = ej.quantize.RTN(bits=4, group_size=32, symmetric=True)
    return ej.quantize_params(dense, [("*/kernel", method), ("*", None)])


def cache(rows=3, slots=SLOTS):
    return new_cache(CONFIG, batch=rows, slots=slots, split=True)


@pytest.fixture(scope="module")
def compiled(packed):
    return compile_generate(APPLY, packed, cache(), PROMPTS, LENGTHS, max_new_tokens=NEW)


def float_sizes(program):
    """Elements of every floating array in a compiled program."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", program.as_text())
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


def test_no_dense_copy_of_a_packed_weight_is_in_either_program(compiled, packed, dense):
    largest = CONFIG.hidden_size * CONFIG.intermediate_size
    assert isinstance(packed["layers_0"]["mlp"]["up_proj"]["kernel"], ej.arrays.Quantized)
    assert max(float_sizes(compiled.decode)) < largest
    assert max(float_sizes(compiled.prefill)) < largest
    unpacking = jax.jit(lambda p, t: DecoderApply(CONFIG)({"params": ej.materialize(p)}, t))
    assert max(float_sizes(unpacking.lower(packed, PROMPTS[:, :1]).compile())) >= largest, "the count would see one"


def test_the_cache_stays_in_place_and_is_there_once(packed):
    """With a cache that is larger than all else, what the programs take besides it is smaller than half of it."""
    large = jax.eval_shape(lambda: cache(rows=1, slots=8192))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 4), (1,))]
    programs = compile_generate(APPLY, packed, large, *shapes, max_new_tokens=4)
    for program in (programs.prefill, programs.decode):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= large.nbytes
        assert memory.temp_size_in_bytes < large.nbytes / 2, (memory.temp_size_in_bytes, large.nbytes)


def test_the_given_cache_is_used_up(compiled, packed):
    given = cache()
    compiled.run(packed, given, PROMPTS, LENGTHS)
    assert all(array.is_deleted() for array in (*given.k, *given.v, given.positions, given.scores))


def test_every_step_is_one_trace(packed):
    lengths = []

    def apply(variables, tokens, **kwargs):
        lengths.append(tokens.shape[1])
        return APPLY(variables, tokens, **kwargs)

    for prompts in (PROMPTS, PROMPTS[::-1]):
        generate(apply, packed, cache(), prompts, LENGTHS, max_new_tokens=NEW, donate_cache=True)
    assert sorted(lengths) == [1, 6]


def test_what_runs_is_what_generate_gives(compiled, packed):
    expected, counts = generate(APPLY, packed, cache(), PROMPTS, LENGTHS, max_new_tokens=NEW)
    tokens, written, stats = compiled.run(packed, cache(), PROMPTS, LENGTHS)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(written, counts)
    assert (stats.rows, stats.prompt_tokens, stats.new_tokens, stats.steps) == (3, 12, 15, 4)
    assert stats.first_token_s > 0 and stats.decode_s > 0
    matrices = jax.tree.leaves({name: leaf for name, leaf in packed.items() if name != "embed"})
    assert stats.weight_bytes == sum(x.size * x.dtype.itemsize for x in matrices) + 3 * 4 * CONFIG.hidden_size
    heads = 2 * 3 * 2
    assert stats.cache_bytes == heads * SLOTS * (2 * 4 * 32 + 4 + 4) + heads * 4 + 3 * 4
    assert stats.bytes_per_token == (stats.weight_bytes + stats.cache_bytes) / 3


def test_packed_rows_alone_equal_rows_together(packed):
    together, _ = generate(APPLY, packed, cache(), PROMPTS, LENGTHS, max_new_tokens=NEW)
    for row in (1, 2):
        prompt = PROMPTS[row : row + 1, : LENGTHS[row]]
        alone, _ = generate(APPLY, packed, cache(rows=1), prompt, LENGTHS[row : row + 1], max_new_tokens=NEW)
        np.testing.assert_array_equal(alone[0], together[row])


def test_stopped_rows_are_counted(packed):
    free, _ = generate(APPLY, packed, cache(), PROMPTS, LENGTHS, max_new_tokens=NEW)
    stops = tuple(sorted({int(free[0, 0]), int(free[1, 1]), int(free[2, 1])}))
    programs = compile_generate(APPLY, packed, cache(), PROMPTS, LENGTHS, max_new_tokens=NEW, stop_tokens=stops)
    _, counts, stats = programs.run(packed, cache(), PROMPTS, LENGTHS)
    assert stats.new_tokens == int(counts.sum()) and stats.steps == int(counts.max()) - 1
    assert int(counts[0]) == 1


def test_a_drawing_program_draws(packed):
    options = {"temperature": 1.5, "top_p": 0.9, "key": jax.random.key(3)}
    programs = compile_generate(APPLY, packed, cache(), PROMPTS, LENGTHS, max_new_tokens=NEW, **options)
    tokens, *_ = programs.run(packed, cache(), PROMPTS, LENGTHS, **options)
    expected, _ = generate(APPLY, packed, cache(), PROMPTS, LENGTHS, max_new_tokens=NEW, **options)
    np.testing.assert_array_equal(tokens, expected)


def test_refused_before_it_runs(compiled, packed):
    with pytest.raises(ConfigError, match="the cache has 7 slots, but prompts and 5 new tokens need 10"):
        compiled.run(packed, cache(slots=7), PROMPTS, LENGTHS)


def test_one_token_is_no_decoding():
    stats = GenerationStats(
        rows=2,
        prompt_tokens=8,
        new_tokens=2,
        steps=0,
        first_token_s=0.5,
        decode_s=1e-5,
        weight_bytes=70,
        cache_bytes=30,
    )
    assert stats.tokens_per_second is None and stats.bytes_per_second is None
    assert stats.bytes_per_token == 100 and stats.prompt_tokens_per_second == 16


def test_a_tied_table_is_read_whole():
    table = {"embed": {"embedding": jnp.ones((10, 4))}}
    assert step_bytes(table, rows=2) == 160
    assert step_bytes(table | {"lm_head": {"kernel": jnp.ones((4, 10))}}, rows=2) == 2 * 16 + 160


@pytest.mark.parametrize("window", [None, 4])
def test_a_split_cache_gives_what_a_whole_one_gives(dense, window):
    """Ragged prompts, then single tokens with a row that stands still: logits, and every array of the cache."""
    apply = jax.jit(DecoderApply(dataclasses.replace(CONFIG, sliding_window=window)))
    whole = new_cache(CONFIG, batch=3, slots=9)
    apart = split_layers(whole)
    for tokens, lengths in ((PROMPTS, LENGTHS), (PROMPTS[:, :1], [1, 0, 1]), (PROMPTS[:, 1:3], [2, 1, 0])):
        lengths = jnp.asarray(lengths, jnp.int32)
        expected, whole = apply({"params": dense}, tokens, cache=whole, lengths=lengths)
        logits, apart = apply({"params": dense}, tokens, cache=apart, lengths=lengths)
        valid = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
        np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-4)
        assert apart.is_split
        chex.assert_trees_all_close(join_layers(apart), whole, atol=1e-5)


def test_a_step_has_the_gradient_of_its_definition(dense):
    """The kernel of a split cache has none of its own; a whole cache attends in plain jax."""
    prompts, lengths = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS)
    _, whole = APPLY({"params": dense}, prompts, cache=new_cache(CONFIG, batch=3, slots=9), lengths=lengths)

    def loss(params, keys, cache):
        cache = cache.replace(k=keys)
        logits, cache = APPLY({"params": params}, prompts[:, :1], cache=cache)
        received = cache.scores[..., :4] ** 2
        return jnp.sum(jnp.sin(logits)) + jnp.sum(received)

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(dense, whole.k, whole)
    apart = split_layers(whole)
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(dense, apart.k, apart)
    chex.assert_trees_all_close(found[0], expected[0], atol=1e-4)
    chex.assert_trees_all_close(jnp.stack(found[1]), expected[1], atol=1e-4)


@pytest.mark.parametrize("group", [1, 4])
def test_one_query_attends_as_many_do(group):
    """A token given alone gets the logits it gets at the end of a text that is given whole."""
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 // group,
    )
    params = jax.jit(Decoder(config).init)(jax.random.key(1), PROMPTS)["params"]
    apply = jax.jit(DecoderApply(config))
    whole, after = apply({"params": params}, PROMPTS, cache=new_cache(config, batch=3, slots=8))
    _, held = apply({"params": params}, PROMPTS[:, :5], cache=new_cache(config, batch=3, slots=8))
    last, held = apply({"params": params}, PROMPTS[:, 5:], cache=held)
    np.testing.assert_allclose(last[:, 0], whole[:, 5], atol=2e-5)
    np.testing.assert_allclose(held.scores, after.scores, atol=1e-5)
    np.testing.assert_allclose(held.scores.sum(-1), np.full((2, 3, 4 // group), 6 * group), rtol=1e-5)


def test_logits_of_the_last_tokens_alone(dense):
    apply = jax.jit(DecoderApply(CONFIG), static_argnames="last_only")
    lengths = jnp.asarray(LENGTHS)
    all_of_them, _ = apply({"params": dense}, PROMPTS, cache=cache(), lengths=lengths)
    last, _ = apply({"params": dense}, PROMPTS, cache=cache(), lengths=lengths, last_only=True)
    assert last.shape == (3, 1, 64)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(last[row, 0], all_of_them[row, length - 1], atol=1e-4)


def test_split_and_back_and_resized():
    whole = init_cache(layers=2, batch=1, kv_heads=2, slots=4, head_dim=3)
    whole = whole.replace(k=jax.random.normal(jax.random.key(0), whole.k.shape))
    apart = split_layers(whole)
    assert apart.is_split and not whole.is_split and apart.nbytes == whole.nbytes and apart.layers == 2
    chex.assert_trees_all_equal(join_layers(apart), whole)
    chex.assert_trees_all_equal(split_layers(apart), apart)
    chex.assert_trees_all_equal(join_layers(resize(apart, 6)), resize(whole, 6))
    empty = init_cache(layers=2, batch=1, kv_heads=2, slots=4, head_dim=3, split=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(empty, apart)


def test_a_scanned_model_refuses_a_split_cache():
    config = dataclasses.replace(CONFIG, scan_layers=True)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), PROMPTS)["params"]
    with pytest.raises(ConfigError, match=r"scans over them \(scan_layers=True\); join it with .*join_layers"):
        jax.eval_shape(DecoderApply(config), {"params": params}, jnp.asarray(PROMPTS), cache=cache())
    wrong = new_cache(CONFIG, batch=2, slots=8, split=True)
    with pytest.raises(ConfigError, match=r"keys are \[2, 2, 2, 8, 32\] but .* \[2, 3, 2, 8, 32\]"):
        jax.eval_shape(DecoderApply(CONFIG), {"params": params}, jnp.asarray(PROMPTS), cache=wrong)


def test_measured_text_refuses_what_text_refuses():
    class Model:
        config = CONFIG

    with pytest.raises(ConfigError, match="prompts must be a list of at least one text"):
        generate_text_measured(Model(), "abc")  # type: ignore[arg-type]
