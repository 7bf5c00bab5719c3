"""Smaller decoders: channels, key heads, query heads and layers against the masked model, on disk and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.cli import main
from effjax.cli.inputs import open_model
from effjax.errors import CalibrationError, ConfigError, LeafError
from effjax.io import save_checkpoint
from effjax.io.formats.gguf_config import to_metadata
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply, new_cache, stack_layers, stages, unstack_layers
from effjax.models.embedded import load_default
from effjax.models.generate import generate
from effjax.models.hf import load_model, save_hf
from effjax.prune import Structured, block_influence, magnitude_scores, random_scores, structured_mask, taylor_scores
from effjax.prune.decoder import decoder_groups, drop_layers, query_head_groups, shrink_decoder
from effjax.sequential import Stage
from effjax.sparsity.by_neuron import by_neuron, neuron_apply
from effjax.sparsity.neurons import active_neurons

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 7)))


def decoder(model_type="llama", **changes):
    sizes = dict(vocab_size=61, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6)
    heads = {} if model_type == "opt" else {"num_key_value_heads": 3, "head_dim": 4}
    config = DecoderConfig(**sizes | heads | {"model_type": model_type} | changes)
    params = Decoder(config).init(jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)
    return config, jax.tree.map(lambda w: w + jnp.asarray(rng.normal(size=w.shape) * 0.2, w.dtype), params)


def logits(config, params, tokens=TOKENS):
    return DecoderApply(config)({"params": params}, tokens)


def cut(config, params, groups, sparsity, seed=0, **options):
    scores = random_scores(groups, jax.random.key(seed))
    mask = structured_mask(params, groups, scores, Structured(sparsity=sparsity, **options))
    return mask, *shrink_decoder(config, params, mask, groups)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_channels_and_key_heads(model_type, tmp_path):
    config, params = decoder(model_type)
    groups = decoder_groups(config, params)
    assert len(groups.groups) == 6
    mask, small_config, small = cut(config, params, groups, 1 / 3)
    assert (small_config.num_key_value_heads, small_config.num_attention_heads) == (2, 4)
    assert small_config.intermediate_size == 14 and small_config.head_dim == 4
    masked = ej.apply_mask(params, mask)
    np.testing.assert_allclose(logits(small_config, small), logits(config, masked), atol=2e-5)
    save_hf(tmp_path / "small", small_config, small)
    again = load_model(tmp_path / "small")
    assert again.config == dataclasses.replace(small_config, bos_token_id=again.config.bos_token_id)
    np.testing.assert_array_equal(logits(again.config, again.params), logits(small_config, small))


def test_choices_differ_from_layer_to_layer_or_not_with_stacked_layers():
    config, params = decoder()
    mask, _, _ = cut(config, params, decoder_groups(config, params).select("*/mlp/*"), 0.5)
    kept = [np.asarray(mask[f"layers_{i}"]["mlp"]["up_proj"]["kernel"])[0] for i in range(3)]
    assert (kept[0] != kept[1]).any() and {k.sum() for k in kept} == {10}

    scanned, stacked = dataclasses.replace(config, scan_layers=True), stack_layers(params)
    groups = decoder_groups(scanned, stacked)
    assert [g.units for g in groups] == [3, 20]
    mask, small_config, small = cut(scanned, stacked, groups, 0.5)
    assert small["layers"]["mlp"]["up_proj"]["kernel"].shape == (3, 24, 10)
    expected = logits(config, unstack_layers(ej.apply_mask(stacked, mask)))
    np.testing.assert_allclose(logits(small_config, small), expected, atol=2e-5)


def test_query_heads_alone():
    config, params = decoder("qwen2")
    groups = query_head_groups(config, params)
    assert len(groups.groups) == 9 and all(g.units == 2 for g in groups)
    mask, small_config, small = cut(config, params, groups, 0.5)
    assert (small_config.num_key_value_heads, small_config.num_attention_heads) == (3, 3)
    assert small["layers_0"]["attention"]["q_proj"]["bias"].shape == (12,)
    expected = logits(config, ej.apply_mask(params, mask))
    np.testing.assert_allclose(logits(small_config, small), expected, atol=2e-5)
    with pytest.raises(LeafError, match="each of the 3 key heads has one query head"):
        query_head_groups(small_config, small)


def test_opt_loses_channels_but_no_heads():
    config, params = decoder("opt")
    groups = decoder_groups(config, params)
    mask, small_config, small = cut(config, params, groups.select("*/mlp/*"), 0.5)
    expected = logits(config, ej.apply_mask(params, mask))
    np.testing.assert_allclose(logits(small_config, small), expected, atol=2e-5)
    with pytest.raises(ConfigError, match="num_attention_heads 6 would become 3, but an OPT config.json has no head_d"):
        cut(config, params, groups.select("*/attention/*"), 0.5)


@pytest.mark.parametrize("model_type", ["qwen3", "opt"])
def test_layers_may_keep_different_numbers_of_channels(model_type, tmp_path):
    """The masked model, with and without a cache, from an effjax checkpoint, by neuron, and part by part."""
    config, params = decoder(model_type, rms_norm_eps=1e-5)  # what files of OPT mean
    groups = decoder_groups(config, params).select("*/mlp/*")
    mask, small_config, small = cut(config, params, groups, 0.4, scope="global")
    kept = [int(np.asarray(mask[f"layers_{i}"]["mlp"]["up_proj"]["kernel"])[0].sum()) for i in range(3)]
    assert len(set(kept)) > 1 and small_config.intermediate_size == tuple(kept)
    masked = ej.apply_mask(params, mask)
    expected = logits(config, masked)
    np.testing.assert_allclose(logits(small_config, small), expected, atol=2e-5)
    texts = []
    for c, p, split in ((config, masked, True), (small_config, small, True), (small_config, small, False)):
        cache = new_cache(c, batch=2, slots=16, split=split)
        texts.append(generate(DecoderApply(c), p, cache, TOKENS, jnp.array([7, 4]), max_new_tokens=6)[0])
    np.testing.assert_array_equal(texts[1], texts[0])
    np.testing.assert_array_equal(texts[2], texts[0])

    save_checkpoint(tmp_path / "small", small, config=small_config.to_hf())
    again = open_model(str(tmp_path / "small")).model
    assert again.config == small_config
    np.testing.assert_array_equal(logits(again.config, again.params), logits(small_config, small))
    by_row = neuron_apply(small_config)({"params": by_neuron(small_config, small)}, TOKENS)
    np.testing.assert_allclose(by_row, expected, atol=2e-5)
    x = TOKENS
    for stage in stages(small_config):
        x = stage.apply(small[stage.name], x)
    assert x.shape == (2, 7, 24)
    dropped, rest = drop_layers(small_config, small, [1])
    assert dropped.widths == (kept[0], kept[2]) and logits(dropped, rest).shape == expected.shape


def test_what_has_one_width_for_all_layers_says_so(tmp_path):
    config, params = decoder()
    _, config, params = cut(config, params, decoder_groups(config, params).select("*/mlp/*"), 0.4, scope="global")
    with pytest.raises(
        ConfigError, match=r"intermediate_size differ, \[.*config.json of a llama model has one for all"
    ):
        save_hf(tmp_path / "small", config, params)
    assert not (tmp_path / "small").exists()
    with pytest.raises(ConfigError, match="GGUF takes one feed-forward width for all layers"):
        to_metadata(config)
    with pytest.raises(ConfigError, match="active_neurons takes one feed-forward width"):
        active_neurons(config, params, TOKENS)
    with pytest.raises(ConfigError, match="a scan stacks kernels of one width: write scan_layers False"):
        dataclasses.replace(config, scan_layers=True)


def test_uneven_heads_and_uneven_queries_are_refused():
    config, params = decoder()
    with pytest.raises(ConfigError, match="layers_./attention/._proj/kernel would keep .* the cache has one shape"):
        cut(config, params, decoder_groups(config, params).select("*/attention/*"), 0.5, scope="global")
    groups = query_head_groups(config, params)
    some = groups.select(lambda path, axis: path.startswith("layers_0"))
    one = dataclasses.replace(some, groups=dict(list(some.groups.items())[:1]))
    with pytest.raises(ConfigError, match=r"layers_0/attention/q_proj/kernel: key heads would keep \[1.0, 2.0, 2.0\]"):
        cut(config, params, one, 0.5)


def test_layers_are_dropped_and_renumbered(tmp_path):
    config, params = decoder()
    small_config, small = drop_layers(config, params, [1])
    assert small_config.num_hidden_layers == 2
    np.testing.assert_array_equal(
        small["layers_1"]["mlp"]["up_proj"]["kernel"], params["layers_2"]["mlp"]["up_proj"]["kernel"]
    )
    skipped = jax.tree.map(lambda w: w, params)  # a layer that adds nothing
    for place in (("attention", "o_proj"), ("mlp", "down_proj")):
        skipped["layers_1"][place[0]][place[1]]["kernel"] *= 0
    np.testing.assert_allclose(logits(small_config, small), logits(config, skipped), atol=1e-5)
    scanned = dataclasses.replace(config, scan_layers=True)
    stacked_config, stacked = drop_layers(scanned, stack_layers(params), [1])
    np.testing.assert_allclose(logits(stacked_config, stacked), logits(small_config, small), atol=1e-5)
    save_hf(tmp_path / "small", small_config, small)
    assert load_model(tmp_path / "small").config.num_hidden_layers == 2
    for wrong in ([3], [-1], [0, 1, 2]):
        with pytest.raises(ConfigError, match="numbers from 0 to 2, of which at least one stays"):
            drop_layers(config, params, wrong)


def test_block_influence_is_one_minus_the_mean_cosine():
    rng = np.random.default_rng(0)
    params = {"embed": {}, "a": rng.normal(size=(4, 4)), "b": np.eye(4) * 3, "c": -np.eye(4)}
    parts = [Stage(name="embed", apply=lambda p, x: x)] + [Stage(name=n, apply=lambda p, x: x @ p) for n in "abc"]
    batches = [rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(1, 5, 4)).astype(np.float32)]
    found = block_influence(parts, params, [jnp.asarray(b) for b in batches])
    cosines = []
    for x in np.concatenate([b.reshape(-1, 4) for b in batches]):
        y = x @ params["a"]
        cosines.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    np.testing.assert_allclose(found, [1 - np.mean(cosines), 0, 2], atol=1e-5)
    with pytest.raises(CalibrationError, match="the calibration set is empty"):
        block_influence(parts, params, [])
    wide = [*parts, Stage(name="d", apply=lambda p, x: x @ p)]
    with pytest.raises(CalibrationError, match=r"d makes \[2, 3, 5\] of \[2, 3, 4\]"):
        block_influence(wide, params | {"d": np.ones((4, 5))}, [jnp.asarray(batches[0])])


def test_a_real_model_gets_smaller_and_still_runs_from_its_files(tmp_path, monkeypatch, capsys):
    """Channels, then queries, then the layer of least influence, then the command line; the order of merit holds."""
    model = load_default(dtype="float32")
    texts = ["def read(path):\n    with open(path) as file:\n        return file.read()", "Return a list of all names."]
    tokens = [jnp.asarray([model.encode(text)]) for text in texts]
    config, params = model.config, model.params
    groups = decoder_groups(config, params).select("*/mlp/*")

    def nll(config, params, tokens):
        logp = [jax.nn.log_softmax(logits(config, params, t)[0, :-1]) for t in tokens]
        return -sum(jnp.take_along_axis(p, t[0, 1:, None], axis=-1).mean() for p, t in zip(logp, tokens, strict=True))

    method = Structured(sparsity=0.2, multiple=8)
    results = {}
    taylor = taylor_scores(lambda p, t: nll(config, p, [t]), params, groups, [(t,) for t in tokens])
    for name, scores in (("taylor", taylor), ("random", random_scores(groups, jax.random.key(0)))):
        mask = structured_mask(params, groups, scores, method)
        results[name] = shrink_decoder(config, params, mask, groups)
    assert nll(*results["taylor"], tokens) < nll(*results["random"], tokens)
    config, params = results["taylor"]
    assert config.intermediate_size == 512
    queries = query_head_groups(config, params)
    mask = structured_mask(params, queries, magnitude_scores(params, queries), Structured(sparsity=0.5))
    config, params = shrink_decoder(config, params, mask, queries)
    influence = block_influence(stages(config), params, tokens)
    config, params = drop_layers(config, params, [int(influence.argmin())])
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 2, 2)
    monkeypatch.chdir(tmp_path)
    save_hf("small", config, params, model.tokenizer.to_str())
    assert main(["generate", "small", "--prompt", "Return", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("Return")
    assert main(["eval", "small", "--windows", "2", "--window-length", "32"]) == 0
    assert "2 windows" in capsys.readouterr().out
