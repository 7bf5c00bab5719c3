"""Floats of 8 and 4 bits in compressed-tensors: values from their bits, round trips, damages."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import CheckpointError, LeafError
from effjax.io.formats import compressed_tensors as ct
from effjax.io.formats.compressed_tensors import CTScheme
from tests.io.formats.bits import damaged, fields_are_sound

SHAPE = (64, 24)
LEVELS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def e4m3(byte):
    """The value of one float8 by its bits: sign, four of exponent (bias 7), three of mantissa."""
    sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def float8_checkpoint(strategy, block=None):
    rng, (inputs, outputs) = np.random.default_rng(0), SHAPE
    codes = rng.integers(0, 256, (outputs, inputs)).astype(np.uint8)
    codes[codes & 127 == 127] = 5
    shape = {"tensor": (1,), "channel": (outputs, 1), "block": (3, 2)}[strategy]
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    values = np.array([[e4m3(int(byte)) for byte in row] for row in codes], np.float32)
    if strategy == "block":
        rows, columns = block
        wide = np.repeat(np.repeat(scale, rows, 0), columns, 1)[:outputs, :inputs]
    else:
        wide = scale
    tensors = {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": scale}
    scheme = CTScheme(format="float-quantized", num_bits=8, strategy=strategy, group_size=None, block=block)
    return tensors, scheme, (values * wide).T


def fp4_checkpoint(kind):
    rng, (inputs, outputs) = np.random.default_rng(1), SHAPE
    codes = rng.integers(0, 16, (outputs, inputs))
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    size = 16 if kind == "nvfp4" else 32
    values = np.array([[(-1 if c > 7 else 1) * LEVELS[c % 8] for c in row] for row in codes], np.float32)
    if kind == "nvfp4":
        stored = rng.integers(1, 120, (outputs, inputs // size)).astype(np.uint8)
        top = np.array([96.0], np.float32)
        scale = np.array([[e4m3(int(byte)) for byte in row] for row in stored], np.float32) / top
        tensors = {"weight_packed": packed, "weight_scale": stored.view(ml_dtypes.float8_e4m3fn)}
        tensors["weight_global_scale"] = top
    else:
        stored = rng.integers(110, 140, (outputs, inputs // size)).astype(np.uint8)
        scale = 2.0 ** (stored.astype(np.float32) - 127)
        tensors = {"weight_packed": packed, "weight_scale": stored}
    strategy = "tensor_group" if kind == "nvfp4" else "group"
    scheme = CTScheme(format=f"{kind}-pack-quantized", num_bits=4, strategy=strategy, group_size=size)
    return tensors, scheme, (values * np.repeat(scale, size, axis=1)).T


CASES = {
    "tensor": float8_checkpoint("tensor"),
    "channel": float8_checkpoint("channel"),
    "block": float8_checkpoint("block", (8, 32)),
    "nvfp4": fp4_checkpoint("nvfp4"),
    "mxfp4": fp4_checkpoint("mxfp4"),
}


def read(tensors, scheme, shape=SHAPE):
    return ct.read("m", tensors, scheme, shape=shape, dtype="float32")


@pytest.mark.parametrize("name", CASES)
def test_values_and_bytes(name):
    tensors, scheme, weight = CASES[name]
    leaf = read(tensors, scheme)
    # XLA divides all scales by one number as a product with its reciprocal, which is one rounding off.
    np.testing.assert_allclose(leaf.materialize(), weight, rtol=2.4e-7 if name == "nvfp4" else 0)
    written = ct.write(leaf, scheme)
    assert sorted(written) == sorted(tensors)
    assert all(written[key].dtype == x.dtype and written[key].tobytes() == x.tobytes() for key, x in tensors.items())
    if name not in ("tensor", "block"):
        assert ct.scheme_for(leaf) == scheme


@pytest.mark.parametrize("method", [ej.quantize.NVFP4(), ej.quantize.MXFP4(), ej.quantize.FP8()], ids=lambda m: str(m))
def test_leaves_of_our_methods(method):
    leaf = method.quantize(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    scheme = ct.scheme_for(leaf)
    np.testing.assert_array_equal(read(ct.write(leaf, scheme), scheme).materialize(), leaf.materialize())


def test_leaves_that_do_not_fit():
    w = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    plain = ej.quantize.FP4(block_size=16).quantize(w)  # the right values, float16 scales
    with pytest.raises(LeafError, match=r"scales are not those of nvfp4: float8_e4m3fn, one for 16 inputs"):
        ct.write(plain, CASES["nvfp4"][1])
    with pytest.raises(LeafError, match=r"values \(Codebook\) are no e2m1 numbers"):
        ct.write(ej.quantize.NF4().quantize(w), CASES["mxfp4"][1])
    with pytest.raises(LeafError, match=r"values \(Codebook\) are no float8 \(e4m3\) numbers"):
        ct.write(plain, CASES["channel"][1])
    with pytest.raises(LeafError, match="its columns differ in scale"):
        ct.write(read(*CASES["channel"][:2]), CASES["tensor"][1])
    with pytest.raises(LeafError, match="has 2 groups of inputs, float-quantized has one scale an output"):
        ct.write(read(*CASES["block"][:2]), CASES["channel"][1])


def nan_weight(tensors):
    tensors["weight"] = tensors["weight"].copy()
    tensors["weight"].view(np.uint8)[2, 3] = 0x7F


DAMAGES = {
    "NaN weight": ("channel", nan_weight, r"m\.weight has 1 values that are NaN or infinite, the first at \[2, 3\]"),
    "integers": ("tensor", lambda t: t.update(weight=t["weight"].view(np.int8)), "is int8, expected float8_e4m3fn"),
    "other grid": ("block", lambda t: t.update(weight_scale=t["weight_scale"][:2]), r"\[2, 2\], expected \[3, 2\]"),
    "truncated": ("nvfp4", lambda t: t.update(weight_packed=t["weight_packed"][:, 1:]), r"\[24, 31\], expected"),
    "scales": ("nvfp4", lambda t: t.update(weight_scale=t["weight_scale"].astype(np.float16)), "is float16, expected"),
    "zero": ("nvfp4", lambda t: t.update(weight_global_scale=np.zeros(1, np.float32)), "global_scale is 0.0, by which"),
    "tiny": (
        "nvfp4",
        lambda t: t.update(weight_global_scale=np.full(1, 1e-38, np.float32)),
        "scales overflow when divided by it",
    ),
    "no global": ("nvfp4", lambda t: t.pop("weight_global_scale"), r"m\.weight_global_scale is missing"),
    "NaN power": ("mxfp4", lambda t: t.update(weight_scale=t["weight_scale"] | 255), "holds 255, which is NaN"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name):
    case, damage, message = DAMAGES[name]
    tensors, scheme, _ = CASES[case]
    tensors = dict(tensors)
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        read(tensors, scheme)


def test_shapes_that_groups_do_not_divide():
    for case, message in (("nvfp4", "groups of 16"), ("mxfp4", "groups of 32"), ("block", "blocks of 32")):
        with pytest.raises(CheckpointError, match=f"{message} do not divide its 40 inputs"):
            read(*CASES[case][:2], (40, 24))


@given(st.data(), st.sampled_from(sorted(CASES)))
@settings(max_examples=90)
def test_fuzz(data, name):
    tensors, scheme, _ = CASES[name]
    changed = data.draw(damaged(tensors))
    try:
        leaf = read(changed, scheme)
    except CheckpointError:
        return
    assert fields_are_sound(leaf, SHAPE)
