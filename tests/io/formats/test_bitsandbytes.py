"""bitsandbytes: high nibble first, blocks of the flattened matrix, nested scales, round trips, damages."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import CheckpointError, ConfigError, LeafError
from effjax.io.formats import bitsandbytes as bnb
from effjax.io.formats.bitsandbytes import BNBScheme
from effjax.quantize.nf4 import LEVELS
from tests.io.formats.bits import damaged, fields_are_sound

FP4 = np.array([s * x / 12 for s in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)], np.float32)


def as_bytes(state):
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def checkpoint(inputs=64, outputs=12, block=64, kind="nf4", nested=False):
    rng, count = np.random.default_rng(0), inputs * outputs
    codes = rng.integers(0, 16, count)
    table = np.asarray(LEVELS, np.float32) if kind == "nf4" else FP4
    blocks = -(-count // block)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [outputs, inputs]}
    tensors = {
        "weight": np.array([[16 * codes[i] + codes[i + 1]] for i in range(0, count, 2)], np.uint8),
        "weight.quant_map": table,
    }
    if nested:
        upper, offset = rng.uniform(0.5, 2, -(-blocks // 4)).astype(np.float32), 0.25
        small, small_codes = np.linspace(-1, 1, 256).astype(np.float32), rng.integers(0, 256, blocks).astype(np.uint8)
        absmax = np.array(
            [small[c] * upper[i // 4] + np.float32(offset) for i, c in enumerate(small_codes)], np.float32
        )
        tensors |= {
            "weight.absmax": small_codes,
            "weight.nested_absmax": upper,
            "weight.nested_quant_map": small,
        }
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": offset}
    else:
        absmax = rng.uniform(0.5, 2, blocks).astype(np.float32)
        tensors["weight.absmax"] = absmax
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = as_bytes(state)
    flat = np.array([table[code] * absmax[i // block] for i, code in enumerate(codes)], np.float32)
    return tensors, flat.reshape(outputs, inputs).T


def read(tensors, shape):
    return bnb.read("m", tensors, shape=shape, dtype="float32")


def test_the_first_code_is_in_the_high_nibble():
    codes = (np.arange(64) % 16)[:, None]
    leaf = ej.arrays.Codebook.from_codes(
        codes, np.asarray(LEVELS, np.float32).reshape(1, 1, 16), np.ones((1, 1), np.float32), dtype="float32"
    )
    assert bnb.write(leaf, BNBScheme())["weight"].ravel()[:4].tobytes().hex() == "01234567"


@pytest.mark.parametrize(("inputs", "block"), [(64, 64), (128, 64), (44, 64), (32, 128)])
def test_values_and_bytes(inputs, block):
    """Blocks may reach over rows: 44 inputs in blocks of 64, 32 inputs in blocks of 128."""
    tensors, weight = checkpoint(inputs=inputs, block=block)
    leaf = read(tensors, weight.shape)
    np.testing.assert_array_equal(leaf.materialize(), weight)
    scheme = bnb.scheme_for(leaf, group_size=block)
    assert scheme == BNBScheme(block_size=block, dtype="float32")
    written = bnb.write(leaf, scheme)
    assert sorted(written) == sorted(tensors)
    assert all(written[key].dtype == x.dtype and written[key].tobytes() == x.tobytes() for key, x in tensors.items())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_scales(kind):
    tensors, weight = checkpoint(kind=kind, nested=True)
    leaf = read(tensors, weight.shape)
    np.testing.assert_array_equal(leaf.materialize(), weight)
    if kind == "nf4":  # written with plain scales, of the same values
        again = read(bnb.write(leaf, bnb.scheme_for(leaf)), weight.shape)
        np.testing.assert_array_equal(again.materialize(), weight)
    else:
        with pytest.raises(LeafError, match=r"values \(Codebook\) are no NF4 levels"):
            bnb.scheme_for(leaf)


def test_leaves_of_our_method():
    w = np.random.default_rng(0).normal(size=(128, 24)).astype(np.float32)
    leaf = ej.quantize.NF4(block_size=64).quantize(w)
    again = read(bnb.write(leaf, bnb.scheme_for(leaf)), w.shape)
    np.testing.assert_array_equal(again.materialize(), leaf.materialize())
    with pytest.raises(LeafError, match="blocks of 16 inputs are none of bitsandbytes"):
        bnb.scheme_for(ej.quantize.NF4(block_size=16).quantize(w))


def test_nearest_is_the_nearest_level_of_the_flattened_blocks():
    w = np.random.default_rng(0).normal(size=(44, 12)).astype(np.float32)
    leaf = bnb.nearest(w, BNBScheme(dtype="float32"), dtype="float32")
    flat, levels = w.T.ravel(), np.asarray(LEVELS)
    expected = np.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        top = np.abs(block).max()
        nearest = [levels[np.argmin(np.abs(levels - x / top))] for x in block.astype(np.float64)]
        expected[start : start + 64] = np.array(nearest, np.float32) * top
    np.testing.assert_array_equal(leaf.materialize(), expected.reshape(12, 44).T)


def state(tensors, **changes):
    key = "weight.quant_state.bitsandbytes__nf4"
    tensors[key] = as_bytes(json.loads(tensors[key].tobytes()) | changes)


DAMAGES = {
    "missing": (lambda t: t.pop("weight.absmax"), r"m\.weight\.absmax is missing"),
    "no state": (lambda t: t.pop("weight.quant_state.bitsandbytes__nf4"), r"nf4 \(or fp4\) is missing"),
    "two states": (lambda t: t.update({"weight.quant_state.bitsandbytes__fp4": as_bytes({})}), "is there twice"),
    "no JSON": (
        lambda t: t.update({"weight.quant_state.bitsandbytes__nf4": np.full(3, 123, np.uint8)}),
        "bitsandbytes__nf4 is no JSON",
    ),
    "other shape": (lambda t: state(t, shape=[12, 32]), r"says shape \[12, 32\], the model has \[12, 64\]"),
    "shape": (lambda t: state(t, shape=None), "lacks blocksize, dtype or shape"),
    "block": (lambda t: state(t, blocksize=0), "blocksize 0"),
    "type": (lambda t: state(t, quant_type="fp4"), "says quant_type 'fp4', its name 'nf4'"),
    "dtype": (lambda t: state(t, dtype="int9"), "dtype 'int9'"),
    "truncated": (lambda t: t.update(weight=t["weight"][:-1]), r"has shape \[383, 1\], expected \[384, 1\]"),
    "NaN": (lambda t: t["weight.absmax"].__setitem__(1, np.nan), r"m\.weight\.absmax has 1 values that are NaN"),
    "nested": (
        lambda t: t.update({"weight.nested_absmax": np.ones(3, np.float32)}),
        "nested scales need nested_blocksize and nested_offset",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name):
    damage, message = DAMAGES[name]
    tensors, weight = checkpoint()
    tensors = {key: x.copy() for key, x in tensors.items()}
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        read(tensors, weight.shape)


VALID = {nested: checkpoint(nested=nested) for nested in (False, True)}


@given(st.data(), st.booleans())
@settings(max_examples=80)
def test_fuzz(data, nested):
    tensors, weight = VALID[nested]
    changed = data.draw(damaged(tensors))
    try:
        leaf = read(changed, weight.shape)
    except CheckpointError:
        return
    assert fields_are_sound(leaf, weight.shape)


def test_configurations():
    made = bnb.config_for({"a": BNBScheme(dtype="bfloat16"), "lm_head": None})
    assert made.scheme("a") is made and made.scheme("lm_head") is None
    assert bnb.parse_config(made.to_json()) == made
    with pytest.raises(LeafError, match="no weight of the model is quantized"):
        bnb.config_for({"lm_head": None})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"load_in_8bit": True}, "load_in_4bit is not true"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "float16"}, "bnb_4bit_quant_storage 'float16' is not read"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "x"}, "llm_int8_skip_modules must list names"),
    ],
)
def test_configurations_that_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        bnb.parse_config(entries)
