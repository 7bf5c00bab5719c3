"""OPT in the decoder: its definition written down in NumPy, cached decoding, files, and what compresses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import effjax as ej
from effjax.errors import ConfigError
from effjax.io.formats.gguf_config import to_metadata
from effjax.models.decoder import Decoder, DecoderApply, new_cache, stack_layers, stages
from effjax.models.folds import decoder_folds
from effjax.models.generate import generate, generate_text
from effjax.models.hf import load_model, save_hf
from effjax.quantize import AWQ, GPTQ, fold_scales
from effjax.recipe import Recipe
from effjax.sequential import compress_sequentially
from effjax.sparsity.neurons import active_neurons
from effjax.sparsity.relu import relufy
from tests.models.families import FAMILIES, hf_tensors, tokens, write_checkpoint

ENTRIES = FAMILIES["opt"]
TOKENS = tokens(rows=2, length=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_checkpoint(tmp_path_factory.mktemp("opt") / "model", ENTRIES))


def oracle(ids):
    """Zhang et al., OPT (2022), over the tensors as they are on disk, in float64."""
    w = {name.removeprefix("model.decoder."): x.astype(np.float64) for name, x in hf_tensors(ENTRIES).items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][2 + np.arange(len(ids))]
    for i in range(2):
        at = f"layers.{i}"
        y = norm(x, f"{at}.self_attn_layer_norm")
        q, k, v = (linear(y, f"{at}.self_attn.{part}_proj").reshape(len(ids), 4, 6) for part in "qkv")
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(6)
        scores = np.where(np.tril(np.ones((len(ids), len(ids)), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(len(ids), 24)
        x = x + linear(attended, f"{at}.self_attn.out_proj")
        h = np.maximum(linear(norm(x, f"{at}.final_layer_norm"), f"{at}.fc1"), 0)
        x = x + linear(h, f"{at}.fc2")
    return norm(x, "final_layer_norm") @ w["embed_tokens.weight"].T


def test_logits_are_those_of_the_definition(model):
    logits = model.apply({"params": model.params}, TOKENS)
    for row, ids in zip(logits, TOKENS, strict=True):
        np.testing.assert_allclose(row, oracle(ids), atol=2e-4)


@pytest.mark.parametrize("split", [False, True])
def test_steps_with_a_cache_give_the_whole_text(model, split):
    whole = model.apply({"params": model.params}, TOKENS)
    cache = new_cache(model.config, batch=2, slots=12, split=split)
    step = jax.jit(model.apply)
    logits, cache = step({"params": model.params}, TOKENS[:, :7], cache=cache)
    np.testing.assert_allclose(logits, whole[:, :7], atol=1e-4)
    for i in range(7, 12):
        logits, cache = step({"params": model.params}, TOKENS[:, i : i + 1], cache=cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=1e-4)


def test_greedy_tokens_are_the_likeliest_ones(model):
    cache = new_cache(model.config, batch=1, slots=9, split=True)
    prompt, lengths = jnp.asarray(TOKENS[:1, :5]), jnp.array([5])
    found, _ = generate(model.apply, model.params, cache, prompt, lengths, max_new_tokens=4)
    ids = TOKENS[0, :5].tolist()
    for _ in range(4):
        ids.append(int(np.argmax(oracle(np.array(ids))[-1])))
    assert found[0].tolist() == ids[5:]


def test_stacked_layers_give_the_same(model):
    config = dataclasses.replace(model.config, scan_layers=True)
    logits = DecoderApply(config)({"params": stack_layers(model.params)}, TOKENS)
    np.testing.assert_allclose(logits, model.apply({"params": model.params}, TOKENS), atol=1e-5)


def test_texts_that_are_too_long_are_refused(model):
    words = {"<unk>": 0, "a": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    with_words = dataclasses.replace(model, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="60 tokens of a prompt and 5 new ones are more than the 64 positions that"):
        generate_text(with_words, ["a " * 59], max_new_tokens=5)


def test_positions_beyond_the_table_are_no_numbers(model):
    short = dataclasses.replace(model.config, max_position_embeddings=5)
    params = model.params | {"embed": model.params["embed"] | {"positions": model.params["embed"]["positions"][:7]}}
    logits = np.asarray(Decoder(short).apply({"params": params}, TOKENS))
    assert np.isnan(logits[:, 5:]).all()


def test_what_is_written_is_what_was_read(model, tmp_path):
    save_hf(tmp_path / "again", model.config, model.params)
    again = load_model(tmp_path / "again")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    shifted = relufy(model.config, shift=0.5)
    assert type(shifted).from_hf(shifted.to_hf()) == shifted
    with pytest.raises(ConfigError, match="hidden_act 'relu' has no place in GGUF"):
        to_metadata(model.config)


def test_blocks_are_compressed_one_by_one(model):
    recipe = Recipe(rules=[(None, GPTQ(bits=8, group_size=8))])
    compressed = compress_sequentially(model.params, recipe, stages(model.config), TOKENS)
    assert ej.is_compressed(compressed["layers_1"]["mlp"]["down_proj"]["kernel"])
    logits = ej.lift(model.apply)({"params": compressed}, TOKENS)
    np.testing.assert_allclose(logits, model.apply({"params": model.params}, TOKENS), atol=0.15)


def test_factors_fold_into_layer_norms_and_through_the_relu(model):
    stats = ej.calibrate(
        lambda p, t: model.apply({"params": p}, t), model.params, [TOKENS], needs=AWQ(group_size=8).needs
    )
    q = ej.quantize_params(model.params, AWQ(bits=8, group_size=8), stats=stats)
    folded = fold_scales(q, decoder_folds(model.config))
    lifted = ej.lift(model.apply)
    np.testing.assert_allclose(lifted({"params": folded}, TOKENS), lifted({"params": q}, TOKENS), atol=0.02)
    names = [producer for producer, _ in decoder_folds(relufy(model.config, shift=0.5))]
    assert "*/mlp/up_proj/kernel" in [producer for producer, _ in decoder_folds(model.config)]
    assert "*/mlp/up_proj/kernel" not in names


def test_neurons_are_those_above_zero(model):
    active = active_neurons(model.config, model.params, TOKENS)
    assert active.shape == (2, 2, 12, 40) and 0.2 < active.mean() < 0.8
