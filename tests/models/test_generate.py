"""Generation: rows alone and together, one compilation, seeds, the top-p mass, stop tokens, and bad arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.models.generate import choose_token, generate, generate_text
from effjax.models.hf import LoadedModel
from tests.models.small import SMALL

CONFIG = dataclasses.replace(SMALL, scan_layers=True)
APPLY = DecoderApply(CONFIG)
PROMPTS = np.random.Generator(np.random.PCG64(3)).integers(0, 40, (3, 6), np.int32)
LENGTHS = np.array([6, 2, 4], np.int32)
NEW = 8


@pytest.fixture(scope="module")
def params():
    tree = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.asarray(PROMPTS))["params"]
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, tree)


def run(params, prompts=PROMPTS, lengths=LENGTHS, *, apply=APPLY, slots=16, new=NEW, **kwargs):
    cache = new_cache(CONFIG, batch=len(prompts), slots=slots)
    tokens, counts = generate(
        apply, params, cache, jnp.asarray(prompts), jnp.asarray(lengths), max_new_tokens=new, **kwargs
    )
    return np.asarray(tokens), np.asarray(counts)


def test_greedy_equals_the_likeliest_token_of_the_whole_text(params):
    tokens, counts = run(params)
    assert counts.tolist() == [NEW] * 3
    likeliest = jax.jit(lambda text, last: jnp.argmax(APPLY({"params": params}, text)[0, last]))
    for row in range(3):
        text = PROMPTS[row, : LENGTHS[row]].tolist()
        for token in tokens[row]:
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(text)] = text
            assert int(likeliest(padded, len(text) - 1)) == token
            text.append(int(token))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_rows_alone_equal_rows_together(params, temperature):
    keys = jax.random.split(jax.random.key(5), 3)
    together, _ = run(params, temperature=temperature, top_p=0.9, key=keys)
    for row in (0, 1):
        prompt = PROMPTS[row : row + 1, : LENGTHS[row]]
        alone, _ = run(
            params, prompt, LENGTHS[row : row + 1], temperature=temperature, top_p=0.9, key=keys[row : row + 1]
        )
        np.testing.assert_array_equal(alone[0], together[row])


def test_compiled_once(params):
    traces = []

    def apply(variables, tokens, **kwargs):
        traces.append(tokens.shape)
        return APPLY(variables, tokens, **kwargs)

    run(params, apply=apply, temperature=0.5, top_p=0.5, key=jax.random.key(0))
    first = len(traces)
    assert {shape[1] for shape in traces} == {6, 1}, "one program for the prompt, one for a token"
    for seed, temperature, top_p in ((1, 0.7, 0.9), (2, 2.0, 0.1)):
        other = jax.tree.map(lambda x: x * 1.1, params)
        run(
            other,
            PROMPTS[::-1],
            LENGTHS[::-1],
            apply=apply,
            temperature=temperature,
            top_p=top_p,
            key=jax.random.key(seed),
        )
    assert len(traces) == first


def test_seeds(params):
    draw = lambda seed: run(params, temperature=1.5, key=jax.random.key(seed))[0]  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    same = np.repeat(PROMPTS[:1], 3, axis=0)
    rows, _ = run(params, same, np.array([6, 6, 6]), temperature=1.5, key=jax.random.key(0))
    assert (rows[0] != rows[1]).any(), "equal prompts in one batch draw independently"


def test_stop_tokens(params):
    free, _ = run(params)
    stop = int(free[0, 3])
    tokens, counts = run(params, stop_tokens=(stop,))
    for row in range(3):
        found = np.flatnonzero(free[row] == stop)
        expected = found[0] + 1 if len(found) else NEW
        assert counts[row] == expected
        np.testing.assert_array_equal(tokens[row, :expected], free[row, :expected])
        assert (tokens[row, expected:] == 0).all()


def test_stops_early_when_all_rows_have(params):
    steps = []

    def apply(variables, tokens, **kwargs):
        jax.debug.callback(lambda: steps.append(1))
        return APPLY(variables, tokens, **kwargs)

    free, _ = run(params)
    run(params, apply=apply, stop_tokens=tuple(int(token) for token in free[:, 1]))
    jax.effects_barrier()
    assert len(steps) == 2, "the prompt and one more token"


def test_low_temperature_is_greedy_and_tiny_mass_too(params):
    greedy, _ = run(params)
    np.testing.assert_array_equal(run(params, temperature=1e-4, key=jax.random.key(0))[0], greedy)
    np.testing.assert_array_equal(run(params, temperature=3.0, top_p=1e-6, key=jax.random.key(0))[0], greedy)


def test_top_p_draws_from_the_smallest_set_with_its_mass():
    probabilities = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = jnp.broadcast_to(jnp.log(probabilities), (4000, 5)).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    for top_p, allowed in ((0.3, [1]), (0.6, [1, 3]), (0.66, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])):
        drawn = np.asarray(choose_token(logits, keys, 1.0, top_p))
        share = np.bincount(drawn, minlength=5) / 4000
        expected = np.where(np.isin(np.arange(5), allowed), probabilities, 0)
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
        assert set(drawn) == set(allowed)


def test_temperature_sharpens():
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0]), (4000, 2))
    keys = jax.random.split(jax.random.key(1), 4000)
    for temperature in (0.5, 1.0, 2.0):
        share = float(choose_token(logits, keys, temperature).mean())
        assert abs(share - 1 / (1 + np.exp(-1 / temperature))) < 0.03


def test_continues_from_a_cache(params):
    """A prompt in two parts gives what the whole prompt gives."""
    _, cache = jax.jit(APPLY)({"params": params}, PROMPTS[:, :1], cache=new_cache(CONFIG, batch=3, slots=16))
    rest, _ = generate(APPLY, params, cache, jnp.asarray(PROMPTS[:, 1:]), jnp.asarray(LENGTHS - 1), max_new_tokens=NEW)
    np.testing.assert_array_equal(rest, run(params)[0])
    assert int(cache.length.max()) == 1, "the given cache is not used up"


def test_inside_an_outer_jit(params):
    @jax.jit
    def outer(params, prompts, lengths):
        cache = new_cache(CONFIG, batch=3, slots=16)
        return generate(APPLY, params, cache, prompts, lengths, max_new_tokens=NEW)

    np.testing.assert_array_equal(outer(params, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))[0], run(params)[0])


def test_donated_cache_is_used_up(params):
    cache = new_cache(CONFIG, batch=3, slots=16)
    generate(APPLY, params, cache, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), max_new_tokens=NEW, donate_cache=True)
    assert cache.k.is_deleted()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"slots": 12}, "the cache has 12 slots, but prompts and 8 new tokens need 13; make it with slots=13"),
        ({"new": 0}, "max_new_tokens must be a whole number of at least 1, found 0"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or a finite positive number, found -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1.0}, r"needs a key; write key=jax.random.key\(seed\)"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"stop_tokens": (-1,)}, r"stop_tokens must be token ids, found \(-1,\)"),
        ({"lengths": np.array([6, 0, 4])}, r"prompt_lengths must be from 1 to 6 .* found \[6 0 4\]"),
        ({"lengths": np.array([7, 1, 4])}, "prompt_lengths must be from 1 to 6"),
        ({"lengths": np.array([6, 1])}, r"prompt_lengths \[batch\], found \[3, 6\] and \[2\]"),
        ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 2)}, r"one a row \(\[3\]\), found \[2\]"),
    ],
)
def test_refused(params, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        run(params, **kwargs)


@pytest.fixture(scope="module")
def model(params):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i + 2 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")} | {"<s>": 0, "</s>": 1}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    config = dataclasses.replace(CONFIG, bos_token_id=0, eos_token_ids=(1,))
    return LoadedModel(config=config, params=params, tokenizer=tokenizer, source="letters")


def test_text_front(model):
    assert model.encode("abc") == [0, 2, 3, 4]
    texts = generate_text(model, ["abc", "hello world", ""], max_new_tokens=5)
    assert texts == [generate_text(model, [prompt], max_new_tokens=5)[0] for prompt in ("abc", "hello world", "")]
    drawn = generate_text(model, ["abc"], max_new_tokens=5, temperature=2.0, seed=1)
    assert drawn == generate_text(model, ["abc"], max_new_tokens=5, temperature=2.0, seed=1)
    assert len(generate_text(model, ["abc"], max_new_tokens=1, stop_tokens=range(40))[0]) == 0, (
        "the stop token is left out"
    )


def test_text_front_takes_another_apply_and_params(model):
    seen = []

    def apply(variables, tokens, **kwargs):
        seen.append(tokens.shape)
        return model.apply({"params": jax.tree.map(lambda x: x / 2, variables["params"])}, tokens, **kwargs)

    doubled = jax.tree.map(lambda x: x * 2, model.params)
    assert generate_text(model, ["abc"], apply=apply, params=doubled) == generate_text(model, ["abc"])
    assert seen


@pytest.mark.parametrize(
    ("change", "prompts", "message"),
    [
        ({}, "abc", "prompts must be a list of at least one text"),
        ({}, [], "prompts must be a list of at least one text"),
        ({"tokenizer": None}, ["abc"], "letters: has no tokenizer.json"),
        ({"config": dataclasses.replace(CONFIG, bos_token_id=None)}, [""], "prompt '' has no token"),
        ({"config": dataclasses.replace(CONFIG, vocab_size=10)}, ["z"], "makes token 27, but vocab_size is 10"),
    ],
)
def test_text_front_refuses(model, change, prompts, message):
    with pytest.raises(ConfigError, match=message):
        generate_text(dataclasses.replace(model, **change), prompts)
