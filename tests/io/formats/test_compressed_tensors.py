"""compressed-tensors: vectors, an oracle bit by bit, the padded words of old versions, damages and configurations."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.arrays import Permuted, Quantized
from effjax.errors import CheckpointError, ConfigError, LeafError
from effjax.io.formats import compressed_tensors as ct
from effjax.io.formats import gptq, words
from effjax.io.formats.compressed_tensors import CTScheme
from tests.io.formats.bits import damaged, fields_are_sound, hexes, int32, stream_words

SHAPE = (64, 24)  # inputs, outputs


def checkpoint(bits=4, strategy="group", symmetric=True, kind="pack-quantized", shape=SHAPE, seed=0):
    """Signed codes, scales and zero points drawn at random, and the tensors they make, packed bit by bit."""
    rng, (inputs, outputs), half = np.random.default_rng(seed), shape, 2 ** (bits - 1)
    size = 32 if strategy == "group" else inputs
    groups = inputs // size
    codes = rng.integers(-half, half, (outputs, inputs))
    scale = rng.uniform(0.5, 2, (1,) if strategy == "tensor" else (outputs, groups)).astype(np.float16)
    zero = np.zeros(scale.shape, int) if symmetric else rng.integers(-half, half, scale.shape)
    if kind == "int-quantized":
        tensors = {"weight": codes.astype(np.int8), "weight_scale": scale}
    else:
        packed = np.stack([int32(stream_words(row + half, bits)) for row in codes])
        tensors = {"weight_packed": packed, "weight_scale": scale, "weight_shape": np.array([outputs, inputs])}
    if not symmetric:
        if kind == "int-quantized" or strategy == "tensor":
            tensors["weight_zero_point"] = zero.astype(np.int8)
        else:
            columns = [int32(stream_words(zero[:, g] + half, bits)) for g in range(groups)]
            tensors["weight_zero_point"] = np.stack(columns, axis=1)
    if strategy == "tensor":
        scale, zero = scale[None], zero[None]
    rows = np.arange(inputs) // size
    weight = ((codes - zero[:, rows]).astype(np.float32) * scale.astype(np.float32)[:, rows]).T
    group_size = size if strategy == "group" else None
    scheme = CTScheme(format=kind, num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
    return tensors, scheme, weight


def read(tensors, scheme, shape=SHAPE):
    return ct.read("m", tensors, scheme, shape=shape, dtype="float32")


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [
        (4, list(range(-8, 8)), ["76543210", "FEDCBA98"]),
        (8, [-128, -1, 0, 127], ["FF807F00"]),
        (3, [i % 8 - 4 for i in range(32)], ["88FAC688", "C688FAC6", "FAC688FA"]),
    ],
)
def test_golden_vectors(bits, row, expected):
    codes = np.array(row)[:, None] + 2 ** (bits - 1)
    leaf = Quantized.from_codes(codes, np.ones((1, 1), np.float16), None, bits=bits, dtype="float32")
    scheme = CTScheme(num_bits=bits, strategy="channel", group_size=None)
    assert hexes(ct.write(leaf, scheme)["weight_packed"]) == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_values_and_bytes(bits, symmetric):
    tensors, scheme, weight = checkpoint(bits, symmetric=symmetric)
    leaf = read(tensors, scheme)
    np.testing.assert_array_equal(leaf.materialize(), weight)
    assert_same(ct.write(leaf, scheme), tensors)
    assert ct.scheme_for(leaf) == scheme


@pytest.mark.parametrize("kind", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_a_channel_or_tensor(kind, strategy, symmetric):
    tensors, scheme, weight = checkpoint(8, strategy, symmetric, kind)
    leaf = read(tensors, scheme)
    np.testing.assert_array_equal(leaf.materialize(), weight)
    assert_same(ct.write(leaf, scheme), tensors)


def test_inputs_that_fill_no_word_and_bfloat16_scales():
    for bits in (3, 4, 5):
        tensors, scheme, weight = checkpoint(bits, "channel", shape=(61, 7))
        tensors["weight_scale"] = tensors["weight_scale"].astype(ml_dtypes.bfloat16)
        assert_same(ct.write(read(tensors, scheme, (61, 7)), scheme), tensors)
    tensors["weight_packed"][2, -1] |= np.int32(-(2**31))
    with pytest.raises(CheckpointError, match="weight_packed has bits set behind its 61 codes"):
        read(tensors, scheme, (61, 7))


def padded(codes, bits):
    """Words of `32 // bits` whole codes, as versions up to 0.12 packed."""
    per_word = 32 // bits
    return int32(
        [
            [sum(int(c) << bits * i for i, c in enumerate(row[k : k + per_word])) for k in range(0, len(row), per_word)]
            for row in codes
        ]
    )


@pytest.mark.parametrize(("bits", "width"), [(3, 7), (5, 11), (6, 13), (7, 16)])
def test_padded_words_are_told_by_their_number(bits, width):
    """64 columns: 7, 11, 13, 16 words instead of 6, 10, 12, 14, which the peers' unpacker reads as garbage."""
    tensors, scheme, weight = checkpoint(bits)
    codes = words.unpack(np.asarray(read(tensors, scheme).codes), bits, 64).T
    old = tensors | {"weight_packed": padded(codes, bits)}
    assert old["weight_packed"].shape[1] == width != tensors["weight_packed"].shape[1]
    leaf = read(old, scheme)
    np.testing.assert_array_equal(leaf.materialize(), weight)
    assert_same(ct.write(leaf, scheme), tensors)  # written densely
    for wrong in (width + 1, width - 1 if width - 1 != tensors["weight_packed"].shape[1] else width - 2):
        with pytest.raises(CheckpointError, match="words in versions up to 0.12"):
            read(tensors | {"weight_packed": np.resize(old["weight_packed"], (24, wrong))}, scheme)


def test_padded_words_of_a_width_that_fits_both():
    """20 codes of 3 bits are two words either way: the version decides, and without one this is refused."""
    codes = np.random.default_rng(0).integers(0, 8, (4, 20))
    codes[:, 10] = 7  # in dense words bits 30 and 31 of the first word belong to this code
    tensors = {
        "weight_packed": padded(codes, 3),
        "weight_scale": np.ones((4, 1), np.float16),
        "weight_shape": np.array([4, 20]),
    }
    for version, readable in (("0.12.2", True), ("0.9.0", True)):
        config = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "channel"}}}}
        entries = config | {"format": "pack-quantized", "version": version}
        scheme = ct.parse_config(entries).scheme("m")
        assert scheme.padded_words is readable
        assert words.unpack(np.asarray(read(tensors, scheme, (20, 4)).codes), 3, 20).T.tolist() == codes.tolist()
    unsaid = CTScheme(num_bits=3, strategy="channel", group_size=None)
    with pytest.raises(CheckpointError, match="2 words for 20 codes of 3 bits may be packed densely or with padding"):
        read(tensors, unsaid, (20, 4))
    dense = tensors | {"weight_packed": np.stack([int32(stream_words(row, 3)) for row in codes])}
    assert words.unpack(np.asarray(read(dense, unsaid, (20, 4)).codes), 3, 20).T.tolist() == codes.tolist()


def test_legacy_order_of_groups():
    tensors, scheme, _ = checkpoint()
    g_idx = np.random.default_rng(0).permutation(np.arange(64) // 32).astype(np.int32)
    leaf = read(tensors | {"weight_g_idx": g_idx}, scheme)
    assert isinstance(leaf, Permuted)
    codes = words.unpack(words.to_bytes(np.ascontiguousarray(tensors["weight_packed"].T)), 4, 64).astype(int) - 8
    expected = codes * tensors["weight_scale"].T.astype(np.float32)[g_idx]
    np.testing.assert_array_equal(leaf.materialize(), expected)
    with pytest.raises(LeafError, match="no runs of inputs, and compressed-tensors gave up weight_g_idx"):
        ct.scheme_for(leaf)
    unused = read(tensors | {"weight_g_idx": np.full(64, -1, np.int32)}, scheme)
    assert_same(ct.write(unused, scheme), tensors)
    with pytest.raises(CheckpointError, match="weight_g_idx has groups 0 to 5, there are 2"):
        read(tensors | {"weight_g_idx": np.where(np.arange(64) == 3, 5, g_idx).astype(np.int32)}, scheme)


def test_from_gptq_and_back():
    w = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
    for method in (ej.quantize.RTN(group_size=32, symmetric=True), ej.quantize.RTN(bits=3, group_size=64)):
        leaf = method.quantize(w)
        first, second = ct.scheme_for(leaf), gptq.scheme_for(leaf, version=2)
        through = read(ct.write(leaf, first), first, (64, 32))
        assert_same(gptq.write(through, second), gptq.write(leaf, second))


def test_leaves_that_do_not_fit():
    w = np.random.default_rng(1).normal(size=(60, 32)).astype(np.float32)
    with pytest.raises(LeafError, match="zero points are real numbers"):
        leaf = ej.quantize.RTN(group_size=30).quantize(w)
        ct.scheme_for(leaf.replace(zeros=np.zeros(leaf.scales.shape, np.float32)))
    with pytest.raises(LeafError, match="one-bit grid is centred between its two levels"):
        ct.scheme_for(ej.quantize.RTN(bits=1, group_size=30, symmetric=True).quantize(w))
    with pytest.raises(LeafError, match="groups of 30 inputs differ within groups of 60"):
        ct.write(ej.quantize.RTN(group_size=30).quantize(w), CTScheme(strategy="channel", group_size=None))
    with pytest.raises(LeafError, match="its columns differ in scale"):
        ct.write(
            ej.quantize.RTN(group_size=None, symmetric=True).quantize(w), CTScheme(strategy="tensor", group_size=None)
        )


PACKED = {
    "missing": (lambda t: t.pop("weight_shape"), r"m\.weight_shape is missing"),
    "truncated": (
        lambda t: t.update(weight_packed=t["weight_packed"][:, :7]),
        r"has shape \[24, 7\], expected \[24, 8\]",
    ),
    "doubled": (lambda t: t.update(weight_packed=np.tile(t["weight_packed"], 2)), r"\[24, 16\], expected \[24, 8\]"),
    "rows": (lambda t: t.update(weight_packed=t["weight_packed"][:23]), r"\[23, 8\], expected \[24, 8\]"),
    "other shape": (
        lambda t: t.update(weight_shape=np.array([24, 56])),
        r"m\.weight_shape says \[24, 56\], the model has \[24, 64\]",
    ),
    "negative shape": (lambda t: t.update(weight_shape=np.array([24, -64])), r"weight_shape says \[24, -64\]"),
    "NaN scale": (lambda t: t["weight_scale"].__setitem__((2, 1), np.nan), r"weight_scale .* the first at \[2, 1\]"),
    "scales": (lambda t: t.update(weight_scale=t["weight_scale"][:, :1]), r"\[24, 1\], expected \[24, 2\] \(64 inputs"),
    "zeros": (lambda t: t.update(weight_zero_point=np.ones(24, np.int32)), "is not 0, but the weights are symmetric"),
    "unknown": (lambda t: t.update(weight_extra=np.ones(3)), r"m\.weight_extra is not known"),
}


@pytest.mark.parametrize("name", PACKED)
def test_damage(name):
    damage, message = PACKED[name]
    tensors, scheme, _ = checkpoint()
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        read(tensors, scheme)


def test_damage_of_asymmetric_and_plain_weights():
    tensors, scheme, _ = checkpoint(symmetric=False)
    with pytest.raises(CheckpointError, match=r"weight_zero_point has shape \[2, 2\], expected \[3, 2\]"):
        read(tensors | {"weight_zero_point": tensors["weight_zero_point"][:2]}, scheme)
    tensors, scheme, _ = checkpoint(4, kind="int-quantized")
    tensors["weight"][3, 3] = 8
    with pytest.raises(CheckpointError, match=r"m\.weight has values from -8 to 8, 4 bits hold -8 to 7"):
        read(tensors, scheme)
    with pytest.raises(CheckpointError, match="groups of 48 do not divide its 64 inputs"):
        read(tensors, CTScheme(format="int-quantized", group_size=48))


def test_what_belongs_to_activations_is_passed_over():
    tensors, scheme, weight = checkpoint(8, "channel", kind="int-quantized")
    extra = {"input_scale": np.ones(1, np.float32), "input_zero_point": np.zeros(1, np.int8)}
    np.testing.assert_array_equal(read(tensors | extra, scheme).materialize(), weight)


VALID = {
    name: checkpoint(bits, symmetric=symmetric, kind=kind)
    for name, bits, symmetric, kind in [
        ("packed", 4, True, "pack-quantized"),
        ("three bits", 3, False, "pack-quantized"),
        ("plain", 8, False, "int-quantized"),
    ]
}


@given(st.data(), st.sampled_from(sorted(VALID)))
@settings(max_examples=90)
def test_fuzz(data, name):
    tensors, scheme, _ = VALID[name]
    changed = data.draw(damaged(tensors))
    try:
        leaf = read(changed, scheme)
    except CheckpointError:
        return
    assert fields_are_sound(leaf, SHAPE)


W4A16 = json.loads(
    """{"config_groups": {"group_0": {"targets": ["Linear"],
   "weights": {"num_bits": 4, "type": "int", "symmetric": true, "group_size": 128,
               "strategy": "group", "dynamic": false},
   "input_activations": null, "output_activations": null, "format": null}},
 "quant_method": "compressed-tensors", "kv_cache_scheme": null, "format": "pack-quantized",
 "quantization_status": "compressed", "global_compression_ratio": null, "ignore": ["lm_head"]}"""
)


def test_configuration():
    config = ct.parse_config(W4A16)
    assert config.scheme("model.layers.0.mlp.up_proj") == CTScheme() and config.scheme("lm_head") is None
    assert config.to_json() == W4A16
    made = ct.config_for({"a": CTScheme(), "b": CTScheme(num_bits=8), "c": CTScheme(), "lm_head": None})
    assert made.scheme("a") == made.scheme("c") == CTScheme() and made.scheme("b").num_bits == 8
    assert made.scheme("lm_head") is None
    assert ct.parse_config(made.to_json()) == made


def test_mixed_formats_and_targets_by_name():
    block = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {
        "all": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}, "format": "pack-quantized"},
        "down": {"targets": ["re:.*down_proj$"], "weights": block, "format": "float-quantized"},
        "one": {"targets": ["a.up_proj"], "weights": {"num_bits": 8, "group_size": -1}, "format": "naive-quantized"},
        "cache": {"targets": ["re:.*attn"], "weights": None},
    }
    config = ct.parse_config({"config_groups": groups, "format": "mixed-precision", "ignore": ["re:.*gate.*"]})
    assert config.scheme("b.up_proj") == CTScheme(group_size=32)
    assert config.scheme("b.down_proj").format == "float-quantized"
    assert config.scheme("a.up_proj") == CTScheme(
        format="int-quantized", num_bits=8, strategy="channel", group_size=None
    )
    assert config.scheme("a.gate_proj") is None


def changed(**changes):
    group = W4A16["config_groups"]["group_0"]
    return W4A16 | {"config_groups": {"g": group | {"weights": group["weights"] | changes}}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "config_groups must hold at least one group"),
        (W4A16 | {"config_groups": {"g": 3}}, "g must be an object"),
        (W4A16 | {"config_groups": {"g": {"targets": "Linear"}}}, "g: targets must list names"),
        (changed(colour="red"), "g: weights: 'colour' is not known"),
        (changed(num_bits=9), "num_bits 9 with pack-quantized"),
        (changed(type="float"), "type 'float' contradicts format 'pack-quantized'"),
        (changed(type="complex"), "type 'complex'; write int or float"),
        (changed(strategy="token"), "strategy 'token' is not read with pack-quantized"),
        (changed(group_size=0), "group_size 0 with pack-quantized"),
        (W4A16 | {"format": "marlin-24"}, "format 'marlin-24' is not read"),
        (W4A16 | {"format": None}, "format None"),
        (W4A16 | {"ignore": ["re:("]}, "is no regular expression"),
        (W4A16 | {"quantization_status": "frozen"}, "only compressed models are read"),
        (W4A16 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse and transformed models are not read"),
    ],
)
def test_configurations_that_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        ct.parse_config(entries)
