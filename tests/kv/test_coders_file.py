"""Coders on disk: they come back as they were, and damaged or foreign files are refused by name."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.errors import CheckpointError, ConfigError
from effjax.kv import CQ, KIVI, IntKV, KVQuant
from effjax.kv.capture import CapturedKV
from effjax.kv.coded_vectors import empty_slots
from effjax.kv.coders import fit_layers
from effjax.kv.coders_file import load_coders, save_coders
from effjax.kv.coding import fit
from effjax.kv.nomad_slots import NomadLayers

METHODS = {
    "cq": CQ(channels=4, bits=3, iterations=2),
    "integers": IntKV(bits=4, head_dim=8),
    "kvquant": KVQuant(bits=2, head_dim=8, outliers=1, iterations=2),
}


def learned(method, **options):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (2, 2, 40, 8)
    parts = dict(zip(("keys", "values", "key_grads", "value_grads"), keys, strict=True))
    captured = CapturedKV(**{name: jax.random.normal(key, shape) for name, key in parts.items()})
    return fit_layers(method, captured, key=jax.random.key(1), **options)


@pytest.mark.parametrize("name", METHODS)
def test_they_come_back(tmp_path, name):
    coders = dataclasses.replace(learned(METHODS[name], leave=(0,)), exact=3)
    save_coders(tmp_path / "kv.safetensors", coders)
    found = load_coders(tmp_path / "kv.safetensors")
    chex.assert_trees_all_equal(found, coders)
    assert jax.tree.structure(found) == jax.tree.structure(coders)
    assert [file.name for file in tmp_path.iterdir()] == ["kv.safetensors"]


def test_codebooks_of_lookups_come_back(tmp_path):
    books = tuple(jax.random.normal(jax.random.key(i), (2, 4, 16, 2)) for i in range(2))
    save_coders(tmp_path / "kv.safetensors", NomadLayers(books=books))
    chex.assert_trees_all_equal(load_coders(tmp_path / "kv.safetensors"), NomadLayers(books=books))
    told = {"format": "effjax kv coders 1", "coders": '{"nomad": 3}'}
    save_file({f"layers.{i}.books": np.asarray(book) for i, book in enumerate(books)}, tmp_path / "kv", metadata=told)
    with pytest.raises(
        CheckpointError, match=r"kv: holds \['layers.0.books', 'layers.1.books'\], not .*write the file"
    ):
        load_coders(tmp_path / "kv")


def test_a_file_is_not_replaced_unasked(tmp_path):
    coders = learned(METHODS["integers"])
    (tmp_path / "kv").write_text("mine")
    with pytest.raises(CheckpointError, match="kv exists already"):
        save_coders(tmp_path / "kv", coders)
    assert (tmp_path / "kv").read_text() == "mine"
    save_coders(tmp_path / "kv", coders, overwrite=True)
    chex.assert_trees_all_equal(load_coders(tmp_path / "kv"), coders)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="only CQ, PerChannel"):
        save_coders(tmp_path / "kv", learned(KIVI(bits=2, head_dim=8, group_size=8, residual=0)))
    with pytest.raises(CheckpointError, match="its parent directory does not exist"):
        save_coders(tmp_path / "no" / "kv", learned(METHODS["integers"]))
    assert not list(tmp_path.iterdir())


def test_damaged_files(tmp_path):
    file = tmp_path / "kv.safetensors"
    save_coders(file, learned(METHODS["integers"]))
    whole = file.read_bytes()
    told = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    tensors = load_file(file)

    def saved(tensors, **changes):
        save_file(tensors, file, metadata={**told, **changes})

    file.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="kv.safetensors: 3 bytes are missing"):
        load_coders(file)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"holds no coders of a cache \(format None\); write one with `effjax"):
        load_coders(file)
    saved(tensors, coders="{")
    with pytest.raises(CheckpointError, match="the description of its coders is damaged"):
        load_coders(file)
    saved(tensors, coders=told["coders"].replace("PerChannel", "PerMoon"))
    with pytest.raises(CheckpointError, match="coding 'PerMoon' is not known here; known are CQ"):
        load_coders(file)
    saved(tensors, coders=told["coders"].replace('"bits": 4', '"bits": 40'))
    with pytest.raises(CheckpointError, match=r"damaged \(bits=40: choose 1 to 8\)"):
        load_coders(file)
    saved(tensors | {"stray": np.zeros(3)})
    with pytest.raises(CheckpointError, match="stray is no table of a coder"):
        load_coders(file)


def test_tables_of_another_model_are_refused():
    coder = fit(CQ(channels=4, bits=3, fisher=False), jax.random.normal(jax.random.key(0), (2, 40, 8)))
    with pytest.raises(ConfigError, match=r"need codebooks \(3, 2, 8, 4\), found \(2, 2, 8, 4\)"):
        empty_slots(coder, (1, 3, 5, 8), "float32")
    keys = fit(IntKV(bits=4, head_dim=8).keys, jax.random.normal(jax.random.key(0), (2, 40, 8)))
    with pytest.raises(ConfigError, match=r"do not fit vectors \[1, 3, 5, 8\] .*learn them on this model"):
        empty_slots(keys, (1, 3, 5, 8), "float32")
    with pytest.raises(ConfigError, match=r"do not fit vectors \[1, 2, 5, 16\] .*learn them on this model"):
        empty_slots(keys, (1, 2, 5, 16), "float32")
