"""Compression on disk: the bytes of the transforms in memory, whatever the budget and however the files are cut."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import effjax as ej
from effjax.errors import CalibrationError, CheckpointError, ConfigError, LeafError
from effjax.evaluate import next_token_loss
from effjax.io import load_checkpoint, verify_checkpoint
from effjax.io.safetensors_file import write_file
from effjax.models.decoder import stages
from effjax.models.hf import load_model
from effjax.recipe import Recipe, apply_recipe
from effjax.sequential import compress_sequentially
from effjax.stream import Job, compress_checkpoint, open_source
from effjax.stream.work import work_directory
from tests.common.cases import assert_same_bytes

RTN = ej.quantize.RTN(bits=4, group_size=16)
WEIGHTED = ej.sketch.LowRank(rank=4, weighted=True)
RECIPES = {
    "one method": Recipe(rules=[(None, RTN)]),
    "embedding and head": Recipe(
        rules=[("embed/*", ej.quantize.NF4(block_size=16)), ("lm_head/*", RTN), ("*/q_proj/kernel", None), (None, RTN)]
    ),
    "random": Recipe(rules=[("*/mlp/*", ej.sketch.Hashed(ratio=4)), (None, None)], seed=3),
    "pruned": Recipe(
        rules=[("*/mlp/*", ej.prune.Magnitude(sparsity=0.5, scope="global")), (None, ej.prune.Magnitude(pattern="2:4"))]
    ),
}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_those_of_the_transforms_in_memory(name, sharded, tmp_path):
    job = Job(source=open_source(sharded), recipe=RECIPES[name])
    streamed = compress_checkpoint(job, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    model = load_model(sharded)
    expected = apply_recipe(model.params, RECIPES[name])
    assert_same_bytes(loaded.params, expected)
    assert verify_checkpoint(tmp_path / "out") == [] and names(tmp_path) == ["out"]
    assert Recipe.from_dict(loaded.recipe) == RECIPES[name]
    assert loaded.config == model.config.to_hf()
    assert sum(row.nbytes for row in streamed.rows) == ej.nbytes(expected)
    report = {leaf.path: leaf for leaf in ej.report(model.params, expected).leaves}
    for row in streamed.rows:
        if row.error is not None:
            assert row.error == pytest.approx(report[row.path].relative_error, rel=1e-2, abs=1e-6)


def test_calibrated_block_by_block(sharded, tokens, tmp_path):
    """The engine and the function in memory give the same bytes, head and embedding included."""
    recipe = Recipe(rules=[("embed/*", RTN), ("lm_head/*", RTN), ("*/mlp/*", WEIGHTED), (None, RTN)])
    job = Job(source=open_source(sharded), recipe=recipe, calibration=tokens)
    compress_checkpoint(job, tmp_path / "out")
    model = load_model(sharded)
    expected = compress_sequentially(model.params, recipe, stages(model.config), tokens, micro_batch=85)
    assert_same_bytes(load_checkpoint(tmp_path / "out").params, expected)
    plain = Recipe(rules=[("*/mlp/*", WEIGHTED), (None, None)])
    compress_checkpoint(dataclasses.replace(job, recipe=plain), tmp_path / "plain")
    expected = compress_sequentially(model.params, plain, stages(model.config), tokens, micro_batch=85)
    assert_same_bytes(load_checkpoint(tmp_path / "plain").params, expected)
    assert names(tmp_path) == ["out", "plain"]


def test_several_files(tiny, tmp_path):
    job = Job(source=open_source(tiny), recipe=RECIPES["one method"], shard_bytes=8000)
    compress_checkpoint(job, tmp_path / "out")
    files = [name for name in names(tmp_path / "out") if name.endswith(".safetensors")]
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == held
    compress_checkpoint(dataclasses.replace(job, shard_bytes=2**30), tmp_path / "one")
    assert_same_bytes(load_checkpoint(tmp_path / "out").params, load_checkpoint(tmp_path / "one").params)
    assert verify_checkpoint(tmp_path / "out") == []
    raw = bytearray((tmp_path / "out" / files[1]).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "out" / files[1]).write_bytes(raw)
    assert "is damaged (its hash differs)" in verify_checkpoint(tmp_path / "out")[0]
    assert verify_checkpoint(tmp_path / "out")[0].startswith(files[1])
    (tmp_path / "out" / files[1]).unlink()
    assert f"{files[1]}: cannot be read" in verify_checkpoint(tmp_path / "out")[0]


def test_a_budget_cuts_large_leaves_and_changes_no_byte(tmp_path):
    """Matrices of 16 MiB, which take 48 MiB in one piece, under a budget of 40 MiB more than the program takes."""
    config = ej.models.config.DecoderConfig(
        vocab_size=16384, hidden_size=256, intermediate_size=16384, num_hidden_layers=1, num_attention_heads=4
    )
    params = jax.jit(ej.models.decoder.Decoder(config).init)(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    ej.models.hf.save_hf(tmp_path / "wide", config, params)
    cheap = ej.quantize.RTN(bits=3, group_size=64)
    rules = [("embed/*", ej.quantize.NF4()), ("lm_head/*", cheap), (None, cheap)]
    job = Job(source=open_source(tmp_path / "wide"), recipe=Recipe(rules=rules))
    compress_checkpoint(job, tmp_path / "whole")
    roomy = job.schedule(2**40)
    assert all(unit.slices == 1 for unit in roomy.units)
    memory = roomy.base + 40 * 2**20
    tight = job.schedule(memory)
    cut = {unit.name for unit in tight.units if unit.slices > 1}
    assert {"embed/embedding", "layers_0/mlp/gate_proj/kernel"} <= cut
    assert tight.peak <= memory
    compress_checkpoint(job, tmp_path / "tight", memory=memory)
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "tight" / name).read_bytes(), name
    with pytest.raises(ConfigError, match=r"cannot hold .*: it takes \d+ MiB beside the \d+ MiB of the program itself"):
        compress_checkpoint(job, tmp_path / "none", memory=roomy.base)
    assert names(tmp_path) == ["tight", "whole", "wide"]


def test_the_least_budget_that_is_named_is_enough(tiny, tokens, tmp_path):
    job = Job(source=open_source(tiny), recipe=Recipe(rules=[(None, WEIGHTED)]), calibration=tokens)
    with pytest.raises(ConfigError, match=r"allow at least \d+ MiB$") as refusal:
        compress_checkpoint(job, tmp_path / "out", memory=2**20)
    least = 2**20 * int(str(refusal.value).split()[-2])
    assert names(tmp_path) == []
    schedule = job.schedule(least + 2**24)  # the process has grown a little by then
    assert schedule.peak <= least + 2**24


def test_fisher_needs_the_whole_model(tiny, tokens, tmp_path):
    recipe = Recipe(rules=[("*/mlp/*", ej.quantize.SqueezeLLM(bits=3)), ("*/o_proj/*", WEIGHTED), (None, None)])
    job = Job(source=open_source(tiny), recipe=recipe, calibration=tokens)
    with pytest.raises(ConfigError, match="^SqueezeLLM needs gradients of the whole model .*leave --memory out"):
        job.schedule(2**30)
    compress_checkpoint(job, tmp_path / "out")
    model = load_model(tiny)

    def logits(params, batch):
        return model.apply({"params": params}, batch)

    loss = next_token_loss(model.apply)
    stats = ej.calibrate(logits, model.params, [(tokens,)], needs={"fisher"}, where="*/mlp/*/kernel", loss=loss)
    expected = ej.quantize_params(model.params, ej.quantize.SqueezeLLM(bits=3), stats=stats, where="*/mlp/*/kernel")
    found = load_checkpoint(tmp_path / "out").params
    for layer in ("layers_0", "layers_1"):
        assert_same_bytes(found[layer]["mlp"], expected[layer]["mlp"])
        assert type(found[layer]["attention"]["o_proj"]["kernel"]).__name__ == "LowRank"


def damage(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_bad_value_is_named_and_nothing_is_left(tiny, tmp_path):
    bad = shutil.copytree(tiny, tmp_path / "bad")
    damage(bad, lambda t: t["model.layers.1.mlp.down_proj.weight"].__setitem__((5, 7), np.inf))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has 1 values .* at \[5, 7\]"):
        compress_checkpoint(Job(source=open_source(bad), recipe=RECIPES["one method"]), tmp_path / "out")
    assert names(tmp_path) == ["bad"]
    huge = shutil.copytree(tiny, tmp_path / "huge")
    damage(huge, lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__((0, 0), 3e38))
    with pytest.raises(LeafError, match=r"layers_0/mlp/up_proj/kernel .* overflow float16: write scale_dtype"):
        compress_checkpoint(Job(source=open_source(huge), recipe=RECIPES["one method"]), tmp_path / "out")
    assert names(tmp_path) == ["bad", "huge"]


def test_what_cannot_be_opened_or_calibrated(tiny, tokens, tmp_path):
    job = Job(source=open_source(tiny), recipe=RECIPES["one method"])
    compress_checkpoint(job, tmp_path / "out")
    with pytest.raises(ConfigError, match="^out is compressed already: compress the original$"):
        open_source(tmp_path / "out")
    with pytest.raises(CheckpointError, match="^out exists already"):
        compress_checkpoint(job, tmp_path / "out")
    assert work_directory(tmp_path / "out").exists()  # the work that is done may still get its name with overwrite
    compress_checkpoint(job, tmp_path / "out", overwrite=True)
    with pytest.raises(CalibrationError, match="needs calibration windows"):
        Job(source=open_source(tiny), recipe=Recipe(rules=[(None, WEIGHTED)])).schedule(None)
    with pytest.raises(LeafError, match="scope='global'.*exclude each other"):
        rules = [("*/mlp/*", ej.prune.Magnitude(sparsity=0.5, scope="global")), (None, WEIGHTED)]
        Job(source=open_source(tiny), recipe=Recipe(rules=rules), calibration=tokens).schedule(None)


def test_a_tied_head_must_be_the_embedding(tiny, tmp_path):
    twice = shutil.copytree(tiny, tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    write_file(twice / "model.safetensors", tensors | {"lm_head.weight": head})
    assert "lm_head/kernel" not in open_source(twice).tensors
    write_file(twice / "model.safetensors", tensors | {"lm_head.weight": head + 1})
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        open_source(twice)
