"""Which leaf goes into which format with the same values: the matrix of the manual, and the nearest leaf otherwise."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.arrays import Permuted, Quantized
from effjax.errors import LeafError
from effjax.io.formats import compressed_tensors, gptq
from effjax.io.formats.exactness import FORMATS, WRITERS, encode, exactness, nearest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "formats.md"
INPUTS, OUTPUTS = 128, 32


def codes(bits):
    return np.random.default_rng(bits).integers(0, 2**bits, (INPUTS, OUTPUTS))


def uniform(bits, *, lowest=None, groups=4, dtype=np.float16):
    """A grid with scales that float16 holds; zero points from `lowest`, or symmetric."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 2, (groups, OUTPUTS)).astype(np.float16)
    scales = scales if dtype == np.float16 else scales.astype(dtype) * np.float32(1.0001)
    zeros = None if lowest is None else rng.integers(lowest, 2**bits, (groups, OUTPUTS))
    if lowest == 0:
        zeros[0, 0] = 0
    return Quantized.from_codes(jnp.asarray(codes(bits)), jnp.asarray(scales), zeros, bits=bits, dtype="float32")


def dense():
    return jnp.asarray(np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)), jnp.float32)


def real_zeros():
    leaf = uniform(4)
    return leaf.replace(zeros=jnp.full(leaf.scales.shape, 7.5, jnp.float32))


SOURCES = {
    "GPTQ, 4 bits, symmetric": lambda: uniform(4),
    "GPTQ, 8 bits, symmetric": lambda: uniform(8),
    "GPTQ, 3 bits, symmetric": lambda: uniform(3),
    "GPTQ, 4 bits, zero points above 0": lambda: uniform(4, lowest=1),
    "GPTQ v2 or AWQ, a zero point of 0": lambda: uniform(4, lowest=0),
    "GPTQ, act-order": lambda: Permuted(
        array=uniform(4), order=jnp.asarray(np.random.default_rng(0).permutation(INPUTS))
    ),
    "compressed-tensors, 5 bits, symmetric": lambda: uniform(5),
    "compressed-tensors, 8 bits, per channel": lambda: uniform(8, groups=1),
    "compressed-tensors, 4 bits, float32 scales": lambda: uniform(4, dtype=np.float32),
    "compressed-tensors, float8 per channel": lambda: ej.quantize.FP8().quantize(dense()),
    "NVFP4": lambda: ej.quantize.NVFP4().quantize(dense()),
    "MXFP4": lambda: ej.quantize.MXFP4().quantize(dense()),
    "bitsandbytes NF4": lambda: ej.quantize.NF4(block_size=64, scale_dtype="float32").quantize(dense()),
    "HQQ (real zero points)": real_zeros,
    "dense": dense,
}


def matrix():
    """The table of the manual."""
    lines = ["| from | " + " | ".join(FORMATS) + " |", "| --- |" + " :-: |" * len(FORMATS)]
    for name, make in SOURCES.items():
        leaf = make()
        cells = ["exact" if exactness(leaf, target).exact else "–" for target in FORMATS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_manual_shows_this_matrix():
    found = re.search(r"^\| from \| gptq .*?(?=\n\n)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None and found[0] == matrix()


@pytest.mark.parametrize("name", SOURCES)
def test_exact_means_that_values_are_kept(name):
    leaf = SOURCES[name]()
    for target in WRITERS:
        verdict = exactness(leaf, target)
        if not verdict.exact:
            continue
        found = encode(leaf, target)
        reader = WRITERS[target]
        again = reader.read("m", found.tensors, found.scheme, shape=leaf.shape, dtype="float32")
        np.testing.assert_array_equal(again.materialize(), leaf.materialize())


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("GPTQ, act-order", "awq", "its groups are no runs of inputs, and AWQ has no g_idx"),
        ("GPTQ, act-order", "compressed-tensors", "its groups are no runs of inputs, and compressed-tensors gave up"),
        ("GPTQ v2 or AWQ, a zero point of 0", "gptq", "zero points are 0, which version 1 of GPTQ stores like 16"),
        ("compressed-tensors, 5 bits, symmetric", "gptq", "its codes have 5 bits; GPTQ holds 2, 3, 4 and 8"),
        ("compressed-tensors, 4 bits, float32 scales", "awq", "its float32 scales are not all float16 numbers"),
        ("bitsandbytes NF4", "compressed-tensors", r"its values \(Codebook\) lie on no uniform grid"),
        ("HQQ (real zero points)", "gptq_v2", "its zero points are real numbers, not integers"),
        ("NVFP4", "mxfp4", "its scales are not those of mxfp4"),
        ("dense", "gptq", "it is dense, and would be rounded to a grid"),
        ("bitsandbytes NF4", "gguf", "Codebook is not one scale times whole numbers"),
    ],
)
def test_reasons(name, target, reason):
    verdict = exactness(SOURCES[name](), target)
    assert not verdict.exact and re.search(reason, verdict.reason)


def test_unknown_format():
    with pytest.raises(LeafError, match="unknown format 'gptq3'; known are gptq, gptq_v2"):
        exactness(dense(), "gptq3")  # type: ignore[arg-type]


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("name", ["GPTQ, act-order", "dense"])
def test_nearest_fits_and_is_near(name, target):
    leaf = SOURCES[name]()
    before = np.asarray(leaf if name == "dense" else leaf.materialize())
    found = nearest(leaf, target)
    assert exactness(found, target).exact and found.dtype == before.dtype
    rms = np.sqrt(np.square(np.asarray(found.materialize()) - before).mean() / np.square(before).mean())
    assert rms < 0.15, rms


def test_nearest_rounds_only_the_scales_where_that_is_enough():
    leaf = uniform(4, lowest=1, dtype=np.float32)
    found = nearest(leaf, "gptq")
    assert isinstance(found, Quantized)
    np.testing.assert_array_equal(found.codes, leaf.codes)
    np.testing.assert_array_equal(found.scales, leaf.scales.astype(np.float16))


def test_nearest_takes_bits_and_groups_that_are_asked_for():
    found = nearest(dense(), "gptq_v2", bits=3, group_size=16)
    assert isinstance(found, Quantized) and (found.bits, found.group_size) == (3, 16)
    assert nearest(uniform(5), "gptq").bits == 8
    assert nearest(uniform(3), "awq").bits == 4
    with pytest.raises(LeafError, match="too large for float16 scales"):
        nearest(dense() * 1e7, "gptq")


def test_the_scheme_of_the_source_is_kept():
    """One scale for the tensor, or groups of which the leaf has pieces: stored again as they were."""
    w = np.asarray(dense())
    whole = compressed_tensors.CTScheme(format="int-quantized", num_bits=8, strategy="tensor", group_size=None)
    tensors = {"weight": np.ones((OUTPUTS, INPUTS), np.int8), "weight_scale": np.ones(1, np.float32)}
    leaf = compressed_tensors.read("m", tensors, whole, shape=w.shape, dtype="float32")
    assert encode(leaf, "compressed-tensors", like=whole).scheme == whole
    pieces = uniform(4, groups=4)
    coarse = pieces.replace(scales=jnp.repeat(pieces.scales[:2], 2, axis=0))
    like = gptq.GPTQScheme(group_size=64)
    assert encode(coarse, "gptq_v2", like=like).scheme.group_size == 64
    assert encode(coarse, "compressed-tensors", like=like).scheme.group_size == 64
    assert encode(coarse, "awq").scheme.group_size == 32
    assert encode(pieces, "gptq", like=like).scheme.group_size == 32
