"""Whole quantized models: found by their configuration, the same bytes again, and every misfit named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import effjax as ej
from effjax.errors import CheckpointError, ConfigError
from effjax.io.formats.exactness import WRITERS
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, stack_layers
from effjax.models.hf import LoadedModel, load_model
from effjax.models.quantized_hf import load_quantized
from effjax.models.quantized_save import describe, plan, save_quantized_hf
from effjax.paths import leaves_with_paths

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def dense():
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return LoadedModel(config=CONFIG, params=params, tokenizer=None, source="tiny")


def quantized(model, method=None, where=None):
    method = method or ej.quantize.RTN(bits=4, group_size=32, symmetric=True)
    return dataclasses.replace(model, params=ej.quantize_params(model.params, method, where=where))


@pytest.fixture(scope="module")
def written(dense, tmp_path_factory):
    """The model in every format, rounded where it must be."""
    root = tmp_path_factory.mktemp("formats")
    verdicts = {
        name: save_quantized_hf(root / name, dense, format=name, approximate=True, group_size=32) for name in WRITERS
    }
    return root, verdicts


@pytest.fixture
def copy(written, tmp_path):
    """A copy of one of the directories, to be damaged."""
    import shutil

    return lambda name: shutil.copytree(written[0] / name, tmp_path / name)


def change_config(directory, **changes):
    path = directory / "config.json"
    entries = json.loads(path.read_text())
    entries["quantization_config"] |= changes
    path.write_text(json.dumps(entries))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", WRITERS)
def test_found_by_itself_and_written_again(written, tmp_path, name):
    root, verdicts = written
    kinds = {"nvfp4": "Codebook", "mxfp4": "Codebook", "bnb-nf4": "Codebook"}
    found = load_quantized(root / name)
    model = load_model(root / name)
    up = model.params["layers_1"]["mlp"]["up_proj"]["kernel"]
    assert type(up).__name__ == kinds.get(name, "Quantized") and up.dtype == np.float32
    assert sum(not verdict.exact for verdict in verdicts[name]) == 14
    again = save_quantized_hf(tmp_path / "again", model, format=name, schemes=found.schemes)
    assert all(verdict.exact and verdict.error == 0 for verdict in again)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (root / name / file).read_bytes()


def test_errors_are_those_of_the_values(written, dense):
    root, verdicts = written
    before, after = (dict(leaves_with_paths(p)) for p in (dense.params, load_model(root / "gptq").params))
    for verdict in verdicts["gptq"]:
        x, y = before[verdict.path], after[verdict.path]
        dense_y = y.materialize() if hasattr(y, "materialize") else y
        assert verdict.error == float(np.abs(np.asarray(dense_y) - np.asarray(x)).max())


def test_through_all_integer_formats(dense, tmp_path):
    """GPTQ v1 -> compressed-tensors -> AWQ -> GPTQ v2 -> GPTQ v1: the bytes of the beginning."""
    model = quantized(dense)
    save_quantized_hf(tmp_path / "first", model, format="gptq")
    at = "first"
    for name in ("compressed-tensors", "awq", "gptq_v2", "gptq"):
        save_quantized_hf(tmp_path / f"to-{name}", load_model(tmp_path / at), format=name)
        at = f"to-{name}"
    assert (tmp_path / at / "model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


def test_output_names_no_place_on_this_machine(written):
    root, _ = written
    for name in WRITERS:
        assert {file.name for file in (root / name).iterdir()} == {"config.json", "model.safetensors"}
        text = (root / name / "config.json").read_text()
        assert str(root) not in text and "path" not in text and "disk" not in text


def test_several_widths_and_dense_layers(dense, tmp_path):
    rules = [
        ("*/down_proj/kernel", ej.quantize.RTN(bits=8, group_size=None)),
        ("*/gate_proj/kernel", None),
        ("*/kernel", ej.quantize.RTN(bits=4, group_size=32)),
    ]
    model = quantized(dense, rules)
    for name in ("gptq_v2", "compressed-tensors"):
        verdicts = save_quantized_hf(tmp_path / name, model, format=name)
        assert all(verdict.exact for verdict in verdicts)
        again = load_model(tmp_path / name).params
        for path, leaf in leaves_with_paths(model.params):
            other = dict(leaves_with_paths(again))[path]
            assert describe(other) == describe(leaf), path
    with pytest.raises(
        CheckpointError, match="cannot be kept exactly as awq: layers_0/mlp/down_proj/kernel: its codes"
    ):
        save_quantized_hf(tmp_path / "awq", model, format="awq")
    assert not (tmp_path / "awq").exists()


def test_awq_has_one_group_size(dense, tmp_path):
    rules = [
        ("*/down_proj/kernel", ej.quantize.RTN(bits=4, group_size=32)),
        ("*/kernel", ej.quantize.RTN(bits=4, group_size=64)),
    ]
    model = quantized(dense, rules)
    assert all(verdict.exact for verdict in save_quantized_hf(tmp_path / "awq", model, format="awq"))
    assert json.loads((tmp_path / "awq/config.json").read_text())["quantization_config"]["group_size"] == 32
    for path, leaf in leaves_with_paths(load_model(tmp_path / "awq").params):
        if hasattr(leaf, "materialize"):
            same = dict(leaves_with_paths(model.params))[path].materialize()
            np.testing.assert_array_equal(leaf.materialize(), same)


def test_act_order_through_a_model(dense, tmp_path):
    order = jnp.asarray(np.random.default_rng(0).permutation(64), jnp.int32)
    params = jax.tree.map(lambda x: x, dense.params)
    kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
    stored = ej.quantize.RTN(bits=4, group_size=32, symmetric=True).quantize(kernel[order])
    model = quantized(dense)
    leaf = ej.arrays.Permuted(array=stored, order=order)
    model.params["layers_0"]["mlp"]["up_proj"]["kernel"] = leaf
    save_quantized_hf(tmp_path / "gptq", model, format="gptq")
    found = load_model(tmp_path / "gptq")
    again = found.params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(again, ej.arrays.Permuted)
    np.testing.assert_array_equal(again.materialize(), leaf.materialize())
    made = plan(found, "compressed-tensors")
    assert [verdict.path for verdict in made.verdicts if not verdict.exact] == ["layers_0/mlp/up_proj/kernel"]
    logits = [jax.jit(ej.lift(m.apply))({"params": m.params}, jnp.arange(8)[None]) for m in (model, found)]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_stacked_layers(written, dense):
    root, _ = written
    stacked = load_model(root / "gptq", scan_layers=True)
    assert stacked.config.scan_layers
    expected = stack_layers(load_model(root / "gptq").params)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (stacked.params, expected)), strict=True))
    mixed = quantized(dense, where="layers_0/*/kernel")
    made = plan(dataclasses.replace(mixed, params=mixed.params), "gptq")
    assert made.exact
    again = plan(stacked, "gptq")
    tensors = load_file(root / "gptq" / "model.safetensors")
    assert all(np.array_equal(again.tensors[name], x) for name, x in tensors.items())


def test_layers_stored_in_different_ways_are_not_stacked(dense, tmp_path):
    save_quantized_hf(tmp_path / "half", quantized(dense, where="layers_0/*/kernel"), format="gptq")
    with pytest.raises(CheckpointError, match="stored in different ways and cannot be stacked"):
        load_model(tmp_path / "half", scan_layers=True)


def test_dtype(written):
    root, _ = written
    model = load_model(root / "awq", dtype=jnp.bfloat16)
    assert {leaf.dtype for _, leaf in leaves_with_paths(model.params)} == {np.dtype(jnp.bfloat16)}


def test_configuration_beside_config_json(written, copy):
    root, _ = written
    for name, file in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
        directory = copy(name)
        entries = json.loads((directory / "config.json").read_text())
        stored = entries.pop("quantization_config")
        del stored["quant_method"]
        if name == "awq":
            stored = {"w_bit": stored["bits"], "q_group_size": stored["group_size"], "version": "GEMM"}
        (directory / "config.json").write_text(json.dumps(entries))
        (directory / file).write_text(json.dumps(stored))
        found, expected = load_model(directory), load_model(root / name)
        assert all(
            np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(m.params) for m in (found, expected)), strict=True)
        )


def test_blank_biases_and_cache_scales_are_passed_over(copy):
    directory = copy("gptq")
    change_tensors(directory, lambda t: t.update({f"{UP}.bias": np.zeros(128, np.float16)}))
    load_model(directory)
    change_tensors(directory, lambda t: t.update({f"{UP}.bias": np.ones(128, np.float16)}))
    with pytest.raises(CheckpointError, match=f"unexpected {UP}.bias"):
        load_model(directory)
    directory = copy("compressed-tensors")
    scale = {"model.layers.0.self_attn.k_scale": np.ones(1, np.float32), f"{UP}.input_scale": np.ones(1, np.float32)}
    change_tensors(directory, lambda t: t.update(scale))
    load_model(directory)


def test_sharded(written, tmp_path):
    root, _ = written
    tensors = load_file(root / "gptq" / "model.safetensors")
    names = sorted(tensors)
    files = {"model-1.safetensors": names[:30], "model-2.safetensors": names[30:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((root / "gptq" / "config.json").read_bytes())
    found, expected = load_model(tmp_path), load_model(root / "gptq")
    assert all(
        np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(m.params) for m in (found, expected)), strict=True)
    )


def narrower(tensors):
    tensors[f"{UP}.qweight"] = np.ascontiguousarray(tensors[f"{UP}.qweight"][:, :64])


def nan_scale(tensors):
    tensors[f"{UP}.scales"][0, 0] = np.nan


DAMAGES = {
    "missing": (lambda t: t.pop(f"{UP}.scales"), f"{UP}.scales is missing"),
    "all of one": (
        lambda t: [t.pop(f"{UP}.{field}") for field in ("qweight", "qzeros", "scales", "g_idx")],
        rf"missing {UP}.weight \[128, 64\]",
    ),
    "narrower": (narrower, rf"{UP}.qweight has shape \[8, 64\], expected \[8, 128\]"),
    "NaN": (nan_scale, f"{UP}.scales has 1 values that are NaN"),
    "unknown": (lambda t: t.update({"../../etc/passwd": np.ones(3)}), r"unexpected \.\./\.\./etc/passwd"),
    "unknown field": (lambda t: t.update({f"{UP}.extra": np.ones(3)}), f"{UP}.extra is not known"),
    "norm": (lambda t: t.pop("model.norm.weight"), "missing model.norm.weight"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(copy, name):
    damage, message = DAMAGES[name]
    directory = copy("gptq")
    change_tensors(directory, damage)
    with pytest.raises(CheckpointError, match=message):
        load_model(directory)


def test_a_repeated_name_and_a_hole(copy):
    directory = copy("gptq")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    name = f'"{UP}.scales"'
    entry = header[header.index(name) : header.index("}", header.index(name)) + 1]
    twice = header.replace(entry, f"{entry},{entry}").encode()
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + size :])
    with pytest.raises(CheckpointError, match=f"names {UP}.scales more than once"):
        load_model(directory)
    path.write_bytes(data + b"\0\0")
    with pytest.raises(CheckpointError, match="2 bytes too many at the end"):
        load_model(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "quip"}, "quant_method 'quip' is not read; gptq, awq, compressed-tensors, bitsandbytes are"),
        ({"bits": 8}, r"qweight has shape \[8, 64\], expected \[16, 64\] \(8 bits"),
        ({"group_size": 64}, "qzeros has shape"),
        (
            {"dynamic": {"-:.*": {}}},
            "is stored as g_idx, qweight, qzeros, scales, but quantization_config leaves it dense",
        ),
    ],
)
def test_configuration_that_does_not_belong(copy, changes, message):
    directory = copy("gptq")
    change_config(directory, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_model(directory)


def test_configuration_of_a_dense_model(dense, tmp_path):
    from effjax.models.hf import save_hf

    save_hf(tmp_path / "dense", CONFIG, dense.params)
    entries = json.loads((tmp_path / "dense/config.json").read_text())
    (tmp_path / "dense/config.json").write_text(json.dumps(entries | {"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="quantization_config says gptq, but no weight is stored so"):
        load_model(tmp_path / "dense")
    (tmp_path / "dense/config.json").write_text(json.dumps(entries | {"quantization_config": 4}))
    with pytest.raises(ConfigError, match="quantization_config must be an object, found 4"):
        load_model(tmp_path / "dense")


def test_what_cannot_be_written(dense, tmp_path):
    with pytest.raises(CheckpointError, match="14 of 20 tensors cannot be kept exactly as gptq: .* it is dense"):
        save_quantized_hf(tmp_path / "x", dense, format="gptq")
    with pytest.raises(CheckpointError, match="'gguf' is no directory of quantized tensors"):
        plan(dense, "gguf")
    params = dense.params | {"extra": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(CheckpointError, match="unexpected extra/kernel"):
        plan(dataclasses.replace(dense, params=params), "gptq")
    bad = quantized(dense)
    leaf = bad.params["layers_1"]["mlp"]["up_proj"]["kernel"]
    bad.params["layers_1"]["mlp"]["up_proj"]["kernel"] = leaf.replace(scales=leaf.scales.at[0, 0].set(jnp.inf))
    with pytest.raises(CheckpointError, match="layers_1/mlp/up_proj/kernel has values that are not finite"):
        plan(bad, "gptq")
    assert list(tmp_path.iterdir()) == []
