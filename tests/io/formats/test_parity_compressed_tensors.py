"""Live comparison with `compressed-tensors`, in both directions; needs the extra `parity`."""

import numpy as np
import pytest

import effjax as ej
from effjax.io.formats import compressed_tensors as ct
from effjax.io.formats import words
from effjax.io.formats.compressed_tensors import CTScheme

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # torch warns about itself
]
INPUTS, OUTPUTS = 64, 24


@pytest.fixture
def theirs():
    pytest.importorskip("torch")
    return pytest.importorskip("compressed_tensors")


def to_torch(tensors):
    import torch

    def one(x):
        x = np.ascontiguousarray(x)
        if x.dtype.name == "float8_e4m3fn":
            return torch.from_numpy(x.view(np.uint8).copy()).view(torch.float8_e4m3fn)
        return torch.from_numpy(x.copy())

    return {name: one(x) for name, x in tensors.items()}


def to_numpy(tensors):
    import ml_dtypes
    import torch

    def one(x):
        x = x.detach()
        if x.dtype == torch.float8_e4m3fn:
            return x.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return x.numpy()

    return {name: one(x) for name, x in tensors.items()}


def their_scheme(scheme):
    """The group of our configuration as their object: their own validation reads it."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(ct.config_for({"m": scheme, "lm_head": None}).to_json())
    assert config.format == scheme.format and config.ignore == ["lm_head"]
    [group] = config.config_groups.values()
    return group


def their_compressor(scheme):
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(scheme.format)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [64, 61])
def test_packing(theirs, bits, columns):
    import torch
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

    half = 2 ** (bits - 1)
    codes = np.random.default_rng(bits).integers(-half, half, (12, columns)).astype(np.int8)
    ours = np.ascontiguousarray(words.to_words(words.pack((codes.T.astype(int) + half).astype(np.uint8), bits)).T)
    packed = pack_to_int32(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(packed.numpy(), ours)
    np.testing.assert_array_equal(unpack_from_int32(torch.from_numpy(ours), bits, codes.shape).numpy(), codes)
    down = words.to_words(words.pack((codes.astype(int) + half).astype(np.uint8), bits))
    np.testing.assert_array_equal(pack_to_int32(torch.from_numpy(codes), bits, packed_dim=0).numpy(), down)


def weight():
    return np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)).astype(np.float32)


RTN = ej.quantize.RTN
LEAVES = {
    "4 bits, symmetric": lambda: RTN(bits=4, group_size=32, symmetric=True, scale_dtype="float32"),
    "4 bits": lambda: RTN(bits=4, group_size=32, scale_dtype="float32"),
    "3 bits": lambda: RTN(bits=3, group_size=16, scale_dtype="float32"),
    "8 bits, per channel": lambda: RTN(bits=8, group_size=None, symmetric=True, scale_dtype="float32"),
    "5 bits, per channel": lambda: RTN(bits=5, group_size=None, scale_dtype="float32"),
    "float8": lambda: ej.quantize.FP8(),
    "NVFP4": lambda: ej.quantize.NVFP4(),
    "MXFP4": lambda: ej.quantize.MXFP4(),
}


@pytest.mark.parametrize("name", LEAVES)
def test_ours_read_by_them(theirs, name):
    leaf = LEAVES[name]().quantize(weight())
    scheme = ct.scheme_for(leaf)
    found = their_compressor(scheme).decompress(to_torch(ct.write(leaf, scheme)), their_scheme(scheme))["weight"]
    # They multiply floats of four bits in bfloat16 or float32 as their versions decide; integers in float32.
    tolerance = 1e-6 if scheme.format in ("pack-quantized", "float-quantized") else 2e-2
    np.testing.assert_allclose(found.float().numpy().T, leaf.materialize(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", LEAVES)
def test_theirs_read_by_us(theirs, name):
    """They quantize the dense values of our leaf with our scales: the same bytes, and our reader's the same values."""
    leaf = LEAVES[name]().quantize(weight())
    scheme = ct.scheme_for(leaf)
    ours = ct.write(leaf, scheme)
    import torch

    scale = ours["weight_scale"]
    if scheme.format == "mxfp4-pack-quantized":
        scale = np.exp2(scale.astype(np.float32) - 127)
    state = to_torch({"weight": np.asarray(leaf.materialize()).T, "weight_scale": scale.astype(np.float32)})
    if "weight_global_scale" in ours:
        state |= to_torch({"weight_global_scale": ours["weight_global_scale"]})
    if not scheme.symmetric:
        zeros = np.asarray(leaf.zero_points()).T.astype(int) - 2 ** (scheme.num_bits - 1)
        state["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
    found = to_numpy(their_compressor(scheme).compress(state, their_scheme(scheme)))
    found = {field: x for field, x in found.items() if field in ours}
    assert sorted(found) == sorted(ours)
    again = ct.read("m", found, scheme, shape=(INPUTS, OUTPUTS), dtype="float32")
    np.testing.assert_array_equal(again.materialize(), leaf.materialize())
    for field, x in ours.items():
        if field not in ("weight_packed", "weight") or "fp4" not in scheme.format:  # -0 may be written as 0
            np.testing.assert_array_equal(found[field].view(x.dtype) if x.dtype.itemsize == 1 else found[field], x)


def test_int_quantized(theirs):
    leaf = RTN(bits=8, group_size=None, scale_dtype="float32").quantize(weight())
    scheme = CTScheme(format="int-quantized", num_bits=8, symmetric=False, strategy="channel", group_size=None)
    found = their_compressor(scheme).decompress(to_torch(ct.write(leaf, scheme)), their_scheme(scheme))["weight"]
    np.testing.assert_allclose(found.numpy().T, leaf.materialize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_they_misread_padded_words_and_we_do_not(theirs, bits):
    """Why the width decides: words of version 0.12 give their unpacker a matrix of the right shape, but another one."""
    import torch
    from compressed_tensors.compressors import unpack_from_int32

    from tests.io.formats.test_compressed_tensors import padded

    codes = np.random.default_rng(0).integers(0, 2**bits, (4, 64))
    old = padded(codes, bits)
    found = unpack_from_int32(torch.from_numpy(old), bits, codes.shape).numpy().astype(int) + 2 ** (bits - 1)
    assert found.shape == codes.shape and not np.array_equal(found, codes)
    scheme = CTScheme(num_bits=bits, strategy="channel", group_size=None)
    tensors = {"weight_packed": old, "weight_scale": np.ones((4, 1), np.float32), "weight_shape": np.array([4, 64])}
    leaf = ct.read("m", tensors, scheme, shape=(64, 4), dtype="float32")
    np.testing.assert_array_equal(np.asarray(leaf.materialize()).T.astype(int) + 2 ** (bits - 1), codes)
