"""GPTQ: constants and vectors of the format, an oracle bit by bit, round trips byte for byte, and every damage."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.arrays import Permuted, Quantized
from effjax.errors import CheckpointError, ConfigError, LeafError
from effjax.io.formats import gptq
from effjax.io.formats.gptq import GPTQScheme, ZeroPointWarning
from tests.io.formats.bits import damaged, fields_are_sound, hexes, int32, stream_words


def checkpoint(bits=4, inputs=64, outputs=32, group=32, *, version=1, sym=False, g_idx="runs", seed=0, low=1):
    """Codes, zero points and scales drawn at random, and the tensors they make, packed bit by bit."""
    rng = np.random.default_rng(seed)
    groups = -(-inputs // group)
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    zeros = np.full((groups, outputs), 2 ** (bits - 1)) if sym else rng.integers(low, 2**bits, (groups, outputs))
    scales = rng.uniform(0.5, 2, (groups, outputs)).astype(np.float16)
    runs = np.arange(inputs) // group
    rows = runs if g_idx == "runs" else rng.permutation(runs)
    stored = (zeros - (version == 1)) % 2**bits
    tensors = {
        "qweight": np.stack([int32(stream_words(codes[:, n], bits)) for n in range(outputs)], axis=1),
        "qzeros": np.stack([int32(stream_words(stored[g], bits)) for g in range(groups)]),
        "scales": scales,
        "g_idx": rows.astype(np.int32),
    }
    weight = scales.astype(np.float32)[rows] * (codes - zeros[rows]).astype(np.float32)
    scheme = GPTQScheme(bits=bits, group_size=group, sym=sym, desc_act=g_idx != "runs", version=version)
    return tensors, scheme, weight


def read(tensors, scheme, shape):
    return gptq.read("m", tensors, scheme, shape=shape, dtype="float32")


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].tobytes() == x.tobytes(), name


CONSTANTS = {
    (4, 1): ["77777777"],
    (4, 2): ["88888888"],
    (8, 1): ["7F7F7F7F"],
    (8, 2): ["80808080"],
    (2, 1): ["55555555"],
    (2, 2): ["AAAAAAAA"],
    (3, 1): ["DB6DB6DB", "B6DB6DB6", "6DB6DB6D"],
    (3, 2): ["24924924", "49249249", "92492492"],
}


@pytest.mark.parametrize(("bits", "version"), CONSTANTS)
def test_symmetric_zero_points(bits, version):
    leaf = ej.quantize.RTN(bits=bits, group_size=32, symmetric=True).quantize(np.ones((32, 32), np.float32))
    written = gptq.write(leaf, gptq.scheme_for(leaf, version=version))
    constant = CONSTANTS[bits, version]
    assert hexes(written["qzeros"]) == constant * (bits // len(constant))


def test_codes_run_down_the_inputs():
    codes = np.arange(8)[:, None].repeat(8, axis=1)
    leaf = Quantized.from_codes(codes, np.ones((1, 8), np.float16), None, bits=4, dtype="float32")
    assert hexes(gptq.write(leaf, GPTQScheme(group_size=-1))["qweight"]) == ["76543210"] * 8


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("g_idx", ["runs", "any"])
def test_values_and_bytes(bits, version, g_idx):
    tensors, scheme, weight = checkpoint(bits, version=version, g_idx=g_idx)
    leaf = read(tensors, scheme, weight.shape)
    assert isinstance(leaf, Quantized if g_idx == "runs" else Permuted)
    np.testing.assert_array_equal(leaf.materialize(), weight)
    assert_same(gptq.write(leaf, scheme), tensors)
    assert gptq.scheme_for(leaf, version=version) == scheme


def test_one_version_from_the_other():
    tensors, first, weight = checkpoint(version=1)
    expected, second, _ = checkpoint(version=2)
    assert_same(gptq.write(read(tensors, first, weight.shape), second), expected)


def test_symmetric_leaf_has_no_zeros():
    tensors, scheme, weight = checkpoint(sym=True)
    leaf = read(tensors, scheme, weight.shape)
    assert leaf.zeros is None
    assert_same(gptq.write(leaf, scheme), tensors)


def test_groups_that_do_not_divide_the_inputs():
    """104 inputs in groups of 32: the last group has 8 of them, so the leaf has pieces of 8."""
    for kind in ("runs", "any"):
        tensors, scheme, weight = checkpoint(inputs=104, g_idx=kind)
        leaf = read(tensors, scheme, weight.shape)
        np.testing.assert_array_equal(leaf.materialize(), weight)
        assert_same(gptq.write(leaf, scheme), tensors)
        assert gptq.scheme_for(leaf, version=1, group_size=32) == scheme
        assert gptq.scheme_for(leaf, version=1).group_size == 8


def test_per_channel():
    tensors, scheme, weight = checkpoint(group=64)
    for size in (-1, 64, 128):
        changed = GPTQScheme(group_size=size, sym=False)
        assert_same(gptq.write(read(tensors, changed, weight.shape), changed), tensors)
    assert gptq.scheme_for(read(tensors, scheme, weight.shape), version=1).group_size == -1


def test_negative_group_numbers_count_from_the_end():
    tensors, scheme, weight = checkpoint(g_idx="any")
    tensors["g_idx"] = np.where(tensors["g_idx"] == 1, -1, tensors["g_idx"]).astype(np.int32)
    np.testing.assert_array_equal(read(tensors, scheme, weight.shape).materialize(), weight)


def test_g_idx_may_be_missing_where_groups_are_runs():
    tensors, scheme, weight = checkpoint()
    del tensors["g_idx"]
    np.testing.assert_array_equal(read(tensors, scheme, weight.shape).materialize(), weight)


def test_zero_points_are_decoded_field_by_field():
    """Stored 0x3333333F: the lowest field wraps to 0 and leaves its neighbour alone, unlike in word arithmetic."""
    tensors, scheme, weight = checkpoint(outputs=8, group=64)
    tensors["qzeros"] = int32([[0x3333333F]])
    with pytest.warns(ZeroPointWarning, match=r"m\.qzeros: 1 zero points are stored as 15, which .* means 0 or 16"):
        leaf = read(tensors, scheme, weight.shape)
    assert leaf.zero_points().astype(int).tolist() == [[0, 4, 4, 4, 4, 4, 4, 4]]
    assert hexes(gptq.write(leaf, GPTQScheme(group_size=-1, sym=False, version=2))["qzeros"]) == ["44444440"]
    with pytest.raises(LeafError, match="1 of its zero points are 0, which version 1 of GPTQ stores like 16"):
        gptq.write(leaf, scheme)


def test_bfloat16_scales_are_kept_and_wide_ones_only_if_exact():
    import ml_dtypes

    tensors, scheme, weight = checkpoint()
    tensors["scales"] = tensors["scales"].astype(ml_dtypes.bfloat16)
    assert_same(gptq.write(read(tensors, scheme, weight.shape), scheme), tensors)
    leaf = read(tensors, scheme, weight.shape)
    wide = leaf.replace(scales=leaf.scales.astype(np.float32))
    assert gptq.write(wide, scheme)["scales"].dtype == np.float16
    with pytest.raises(LeafError, match="its float32 scales are not all float16 numbers"):
        gptq.write(leaf.replace(scales=np.full(leaf.scales.shape, 0.1, np.float32)), scheme)


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (lambda w: ej.quantize.RTN(bits=5, group_size=32).quantize(w), "codes have 5 bits"),
        (lambda w: ej.quantize.NF4(block_size=32).quantize(w), r"values \(Codebook\) lie on no uniform grid"),
        (lambda w: w, "lie on no uniform grid"),
        (lambda w: ej.quantize.RTN(group_size=32).quantize(w[None]), "one matrix at a time"),
        (lambda w: ej.quantize.RTN(bits=8, group_size=32).quantize(w[:, :3]), "fill no whole 32-bit words"),
    ],
)
def test_leaves_that_do_not_fit(leaf, reason):
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    with pytest.raises(LeafError, match=reason):
        gptq.scheme_for(leaf(w), version=2)


DAMAGES = {
    "missing": (lambda t: t.pop("qzeros"), r"m\.qzeros is missing"),
    "no g_idx": (lambda t: t.pop("g_idx"), r"m\.g_idx is missing"),
    "truncated": (
        lambda t: t.update(qweight=t["qweight"][:7]),
        r"m\.qweight has shape \[7, 32\], expected \[8, 32\] \(4 bits, 64 inputs, 32 outputs, groups of 32\)",
    ),
    "doubled": (lambda t: t.update(qweight=np.tile(t["qweight"], (1, 2))), r"has shape \[8, 64\], expected \[8, 32\]"),
    "wrong width": (lambda t: t.update(qweight=np.tile(t["qweight"], (2, 1))), r"has shape \[16, 32\], expected"),
    "wrong rows": (lambda t: t.update(scales=t["scales"][:1]), r"m\.scales has shape \[1, 32\], expected \[2, 32\]"),
    "wrong dtype": (lambda t: t.update(qweight=t["qweight"].view(np.uint32)), "qweight is uint32, expected int32"),
    "NaN scale": (
        lambda t: t["scales"].__setitem__((1, 3), np.nan),
        r"m\.scales has 1 values that are NaN or infinite, the first at \[1, 3\]",
    ),
    "infinite scale": (lambda t: t["scales"].__setitem__((0, 0), np.inf), "NaN or infinite"),
    "g_idx too large": (lambda t: t["g_idx"].__setitem__(5, 2), r"m\.g_idx has groups 0 to 2, there are 2"),
    "g_idx too small": (lambda t: t["g_idx"].__setitem__(5, -3), r"has groups -3 to 1, there are 2"),
    "blank g_idx": (lambda t: t["g_idx"].fill(0), r"m\.g_idx gives group 1 of 2 no input; .* left it blank"),
    "unknown tensor": (lambda t: t.update({"../evil": t["scales"]}), r"m\.\.\./evil is not known"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name):
    damage, message = DAMAGES[name]
    tensors, scheme, weight = checkpoint(g_idx="any")
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        read(tensors, scheme, weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_wrong_bit_width(bits):
    tensors, scheme, weight = checkpoint(bits=4)
    with pytest.raises(CheckpointError, match=rf"m\.qweight has shape .* expected .*\({bits} bits"):
        read(tensors, GPTQScheme(bits=bits, group_size=32, sym=False), weight.shape)
    with pytest.raises(CheckpointError, match="fills no whole 32-bit words"):
        read(tensors, scheme, (64, 31))


VALID = {kind: checkpoint(g_idx=kind, sym=kind == "runs") for kind in ("runs", "any")}


@given(st.data(), st.sampled_from(sorted(VALID)))
@settings(max_examples=80)
def test_fuzz(data, kind):
    tensors, scheme, weight = VALID[kind]
    changed = data.draw(damaged(tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroPointWarning)
        try:
            leaf = read(changed, scheme, weight.shape)
        except CheckpointError as error:
            assert "m" in str(error)
        else:
            assert fields_are_sound(leaf, weight.shape)


CONFIGS = {
    "minimal": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "AutoGPTQ": {
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "is_marlin_format": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    },
    "GPTQModel": {
        "bits": 4,
        "dynamic": None,
        "group_size": 128,
        "desc_act": False,
        "lm_head": False,
        "method": "gptq",
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "rotation": None,
        "sym": True,
        "meta": {"quantizer": ["gptqmodel:7.0"], "offload_to_disk_path": "elsewhere"},
    },
    "transformers": {
        "quant_method": "gptq",
        "bits": 4,
        "tokenizer": None,
        "dataset": None,
        "group_size": 128,
        "damp_percent": 0.1,
        "desc_act": False,
        "sym": True,
        "format": "gptq",
        "backend": None,
        "checkpoint_format": "gptq",
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name):
    config = gptq.parse_config(CONFIGS[name])
    assert config.default == GPTQScheme() and config.scheme("model.layers.0.mlp.up_proj") == GPTQScheme()
    assert config.scheme("lm_head") is None
    assert gptq.parse_config(config.to_json()) == config
    assert not any("path" in key or "meta" in key for key in config.to_json())


def test_version_2_and_exceptions_by_name():
    config = gptq.parse_config(
        {"bits": 4, "checkpoint_format": "gptq_v2", "dynamic": {"+:.*down.*": {"bits": 8}, "-:.*gate.*": {}, "x": {}}}
    )
    assert config.default.version == 2
    assert config.scheme("model.layers.0.mlp.down_proj").bits == 8
    assert config.scheme("model.layers.0.mlp.gate_proj") is None
    made = gptq.config_for({"a.b": GPTQScheme(), "a.c": GPTQScheme(), "a.d": GPTQScheme(bits=8), "e": None})
    assert made.scheme("a.b").bits == 4 and made.scheme("a.d").bits == 8 and made.scheme("e") is None
    assert made.scheme("a.dd").bits == 4
    assert gptq.parse_config(made.to_json()) == made
    with pytest.raises(LeafError, match="no weight of the model is quantized"):
        gptq.config_for({"a": None})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "bits is missing"),
        ({"bits": 5}, "bits 5; GPTQ weights of 2, 3, 4 and 8 bits are read"),
        ({"bits": True}, "bits True"),
        ({"bits": 4, "group_size": 0}, "group_size 0 is neither positive nor -1"),
        ({"bits": 4, "sym": "yes"}, "sym must be true or false, found 'yes'"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({"bits": 4, "format": "gptq_p"}, "checkpoint_format 'gptq_p' is not read"),
        ({"bits": 4, "is_marlin_format": True}, "'marlin' is not read"),
        ({"bits": 4, "pack_dtype": "int8"}, "pack_dtype 'int8' is not read"),
        ({"bits": 4, "rotation": "hadamard"}, "rotated models are not read"),
        ({"bits": 4, "dynamic": {"+:(": {}}}, r"'\+:\(' is no regular expression"),
        ({"bits": 4, "dynamic": {"+:a": {"bits": 7}}}, "bits 7"),
        ({"bits": 4, "dynamic": {"a": 3}}, "'a' must hold an object"),
        ({"bits": 4, "dynamic": [1]}, "dynamic must map patterns"),
    ],
)
def test_configurations_that_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        gptq.parse_config(entries)
