"""AWQ in the GEMM layout: the interleaved vector, an oracle nibble by nibble, round trips, damages, configurations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import CheckpointError, ConfigError, LeafError
from effjax.io.formats import awq, compressed_tensors, gptq
from effjax.io.formats.awq import AWQScheme
from tests.io.formats.bits import damaged, fields_are_sound, hexes, int32

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def interleaved(codes):
    """Nibble i of word c holds column 8c + ORDER[i]."""
    rows, columns = codes.shape
    return int32(
        [
            [sum(int(codes[r, 8 * c + ORDER[i]]) << 4 * i for i in range(8)) for c in range(columns // 8)]
            for r in range(rows)
        ]
    )


def checkpoint(inputs=64, outputs=24, group=32, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = rng.integers(0, 16, (inputs // group, outputs))
    scales = rng.uniform(0.5, 2, (inputs // group, outputs)).astype(np.float16)
    tensors = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}
    rows = np.arange(inputs) // group
    weight = (codes - zeros[rows]).astype(np.float32) * scales.astype(np.float32)[rows]
    return tensors, AWQScheme(group_size=group), weight


def read(tensors, scheme, shape):
    return awq.read("m", tensors, scheme, shape=shape, dtype="float32")


def test_golden_vector():
    assert hexes(awq.pack_columns(np.arange(8, dtype=np.uint8)[None])) == ["75316420"]
    assert awq.unpack_columns(int32([[0x75316420]])).tolist() == [list(range(8))]


@pytest.mark.parametrize("group", [8, 32, 64])
def test_values_and_bytes(group):
    tensors, scheme, weight = checkpoint(group=group)
    leaf = read(tensors, scheme, weight.shape)
    np.testing.assert_array_equal(leaf.materialize(), weight)
    written = awq.write(leaf, scheme)
    assert all(written[name].tobytes() == x.tobytes() for name, x in tensors.items())
    assert awq.scheme_for(leaf) == (AWQScheme(group_size=-1) if group == 64 else scheme)


def test_to_gptq_and_compressed_tensors_and_back():
    tensors, scheme, weight = checkpoint(outputs=32)
    leaf = read(tensors, scheme, weight.shape)
    second = gptq.scheme_for(leaf, version=2)
    through = gptq.read("m", gptq.write(leaf, second), second, shape=weight.shape, dtype="float32")
    assert all(awq.write(through, scheme)[name].tobytes() == x.tobytes() for name, x in tensors.items())
    third = compressed_tensors.scheme_for(leaf)
    assert not third.symmetric
    through = compressed_tensors.read(
        "m", compressed_tensors.write(leaf, third), third, shape=weight.shape, dtype="float32"
    )
    assert all(awq.write(through, scheme)[name].tobytes() == x.tobytes() for name, x in tensors.items())
    with pytest.raises(LeafError, match="zero points are 0, which version 1"):
        gptq.scheme_for(leaf, version=1)


def test_leaves_that_do_not_fit():
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    with pytest.raises(LeafError, match="codes have 3 bits; AWQ holds 4"):
        awq.scheme_for(ej.quantize.RTN(bits=3, group_size=32).quantize(w))
    with pytest.raises(LeafError, match="12 outputs are no multiple of 8"):
        awq.scheme_for(ej.quantize.RTN(group_size=32).quantize(w[:, :12]))
    with pytest.raises(LeafError, match="scales are not all float16 numbers"):
        awq.scheme_for(ej.quantize.RTN(group_size=32, scale_dtype="float32").quantize(w))
    stored = ej.quantize.RTN(group_size=32, symmetric=True).quantize(w)
    with pytest.raises(LeafError, match="no runs of inputs, and AWQ has no g_idx"):
        awq.scheme_for(
            ej.arrays.Permuted(array=stored, order=np.random.default_rng(0).permutation(64).astype(np.int32))
        )


DAMAGES = {
    "missing": (lambda t: t.pop("scales"), r"m\.scales is missing"),
    "truncated": (lambda t: t.update(qweight=t["qweight"][:, :2]), r"has shape \[64, 2\], expected \[64, 3\]"),
    "doubled": (lambda t: t.update(qweight=np.tile(t["qweight"], 2)), r"has shape \[64, 6\], expected \[64, 3\]"),
    "rows": (lambda t: t.update(qzeros=t["qzeros"][:1]), r"m\.qzeros has shape \[1, 3\], expected \[2, 3\]"),
    "dtype": (lambda t: t.update(scales=t["scales"].astype(np.float64)), "scales is float64, expected float16 or"),
    "NaN": (lambda t: t["scales"].__setitem__((0, 1), np.nan), r"the first at \[0, 1\]"),
    "g_idx": (lambda t: t.update(g_idx=np.zeros(64, np.int32)), r"m\.g_idx is not known"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name):
    damage, message = DAMAGES[name]
    tensors, scheme, weight = checkpoint()
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        read(tensors, scheme, weight.shape)


def test_shape_that_does_not_come_out_even():
    tensors, _, weight = checkpoint()
    with pytest.raises(CheckpointError, match="64 inputs in groups of 48 and 24 outputs in words of 8"):
        read(tensors, AWQScheme(group_size=48), weight.shape)


VALID = checkpoint()


@given(st.data())
@settings(max_examples=50)
def test_fuzz(data):
    tensors, scheme, weight = VALID
    changed = data.draw(damaged(tensors))
    try:
        leaf = read(changed, scheme, weight.shape)
    except CheckpointError:
        return
    assert fields_are_sound(leaf, weight.shape)


def test_configurations():
    plain = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    native = {"w_bit": 4, "q_group_size": 64, "zero_point": True}
    transformers = plain | {"sym": True, "format": "gemm", "modules_to_not_convert": ["visual"], "version": "GEMM"}
    model = {"bits": 4, "group_size": 64, "format": "gemm", "sym": False, "quant_method": "awq"}
    for entries in (plain, native, transformers, model):
        assert awq.parse_config(entries).default == AWQScheme(group_size=64)
    assert awq.parse_config(transformers).scheme("visual.up_proj") is None
    assert awq.parse_config(plain).scheme("lm_head") is None
    made = awq.config_for({"a": AWQScheme(), "b": None, "lm_head": None})
    assert made.to_json() == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["b"],
    }
    assert awq.parse_config(made.to_json()) == made


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bits": 4, "version": "gemv"}, "version 'gemv' is not read; 'gemm' is"),
        ({"bits": 3}, "bits 3; AWQ weights have 4"),
        ({"bits": 4, "group_size": "all"}, "group_size 'all'"),
        ({"bits": 4, "modules_to_not_convert": [1]}, "modules_to_not_convert must list names"),
    ],
)
def test_configurations_that_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        awq.parse_config(entries)


def test_models_that_have_no_configuration():
    with pytest.raises(LeafError, match="no weight of the model is quantized"):
        awq.config_for({"a": None})
    with pytest.raises(LeafError, match=r"groups of \[32, 64\] in one model \(as b\)"):
        awq.config_for({"a": AWQScheme(group_size=32), "b": AWQScheme(group_size=64), "c": AWQScheme(group_size=32)})
    with pytest.raises(LeafError, match="lm_head is quantized"):
        awq.config_for({"lm_head": AWQScheme()})
