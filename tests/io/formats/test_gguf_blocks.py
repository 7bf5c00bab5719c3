"""Block layouts of GGUF against an oracle that takes every weight out of the bits one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.arrays import Quantized, Sum
from effjax.errors import CheckpointError
from effjax.io.formats.gguf_blocks import decode, encode, quantize, why_not
from effjax.io.formats.gguf_types import BY_NAME

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # else (0,)
Q4_0_VECTOR = bytes.fromhex("0040 8091 91a2 a2b3 b3c4 c4d5 d5e6 e6f7 f7f8".replace(" ", ""))  # -16 to 15, d = 2


def half(block: bytes, at: int) -> np.float32:
    """A float16 from its sign, exponent and fraction."""
    bits = block[at] | block[at + 1] << 8
    sign, exponent, fraction = -1.0 if bits >> 15 else 1.0, bits >> 10 & 31, bits & 1023
    assert exponent < 31
    magnitude = fraction * 2.0**-24 if exponent == 0 else (1024 + fraction) * 2.0 ** (exponent - 25)
    return np.float32(sign * magnitude)


def bit(block: bytes, number: int) -> int:
    return block[number // 8] >> number % 8 & 1


def field(block: bytes, first: int, count: int) -> int:
    return sum(bit(block, first + i) << i for i in range(count))


def weight(kind: str, block: bytes, i: int) -> np.float32:
    """Weight `i` of a block, in float32, every operation rounded as in the reference."""
    f = np.float32
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        header = 2 if kind.endswith("0") else 4
        nibbles = header + (4 if kind.startswith("Q5") else 0)
        q = field(block, 8 * (nibbles + i % 16) + 4 * (i // 16), 4)
        if kind.startswith("Q5"):
            q += 16 * bit(block, 8 * header + i)
        if header == 2:
            return half(block, 0) * f(q - (16 if kind == "Q5_0" else 8))
        return half(block, 0) * f(q) + half(block, 2)
    if kind == "Q8_0":
        q = block[2 + i]
        return half(block, 0) * f(q - 256 if q > 127 else q)
    if kind == "Q6_K":
        n, k, lane = i // 128, i // 32 % 4, i % 32
        low = field(block, 8 * (64 * n + 32 * (k % 2) + lane) + 4 * (k // 2), 4)
        high = field(block, 8 * (128 + 32 * n + lane) + 2 * k, 2)
        sc = block[192 + i // 16]
        return half(block, 208) * f(sc - 256 if sc > 127 else sc) * f(low + 16 * high - 32)
    j, lane = i // 32, i % 32  # Q4_K and Q5_K
    s = block[4:16]
    if j < 4:
        sc, m = field(s, 8 * j, 6), field(s, 8 * (j + 4), 6)
    else:
        sc = field(s, 8 * (j + 4), 4) + 16 * field(s, 8 * (j - 4) + 6, 2)
        m = field(s, 8 * (j + 4) + 4, 4) + 16 * field(s, 8 * j + 6, 2)
    at = 16 if kind == "Q4_K" else 48
    q = field(block, 8 * (at + 32 * (j // 2) + lane) + 4 * (j % 2), 4)
    if kind == "Q5_K":
        q += 16 * bit(block, 8 * (16 + lane) + j)
    return half(block, 0) * f(sc) * f(q) - half(block, 2) * f(m)


materialize = jax.jit(ej.materialize)


def dense(leaf) -> np.ndarray:
    return np.asarray(materialize(leaf))


def oracle(kind: str, raw: np.ndarray) -> np.ndarray:
    """`uint8[rows, bytes]` to float32 `[rows, in]`."""
    size, n = BY_NAME[kind].nbytes, BY_NAME[kind].elements
    rows = [row.tobytes() for row in raw]
    blocks = [[row[at : at + size] for at in range(0, len(row), size)] for row in rows]
    return np.array([[weight(kind, block, i) for block in row for i in range(n)] for row in blocks])


def random_rows(kind: str, rng: np.random.Generator, shape: tuple[int, ...] = (2,), blocks: int = 1) -> np.ndarray:
    """Blocks of any bits, with finite scales of either sign."""
    raw = rng.integers(0, 256, (*shape, blocks, BY_NAME[kind].nbytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        scale = rng.normal(size=(*shape, blocks, 1)) * 10.0 ** rng.integers(-6, 3, (*shape, blocks, 1))
        raw[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return raw.reshape(*shape, -1)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_every_weight_is_that_of_the_file(kind, seed):
    raw = random_rows(kind, np.random.default_rng(seed), blocks=2)
    leaf = decode(BY_NAME[kind], raw, name="w")
    np.testing.assert_array_equal(dense(leaf).T, oracle(kind, raw))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scales(kind):
    """Subnormal, zero and largest float16 scales; a fused multiply and add may not round otherwise."""
    raw = random_rows(kind, np.random.default_rng(0), shape=(4,))
    for row, scale in enumerate((6e-8, 0.0, 65504.0, -65504.0)):
        for at in HALVES.get(kind, (0,)):
            raw[row, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    leaf = decode(BY_NAME[kind], raw, name="w")
    np.testing.assert_array_equal(dense(leaf).T, oracle(kind, raw))


@pytest.mark.parametrize(
    "kind, bits, group, scales, per_weight",
    [
        ("Q4_0", 4, 32, "float16", 4.5),
        ("Q5_0", 5, 32, "float16", 5.5),
        ("Q8_0", 8, 32, "float16", 8.5),
        ("Q6_K", 6, 16, "float32", 8.0),
        ("Q4_1", 4, 32, "float16", 6.25),
        ("Q5_1", 5, 32, "float16", 7.375),
        ("Q4_K", 4, 32, "float32", 7.15625),
        ("Q5_K", 5, 32, "float32", 8.1875),
    ],
)
def test_leaves(kind, bits, group, scales, per_weight):
    leaf = decode(BY_NAME[kind], random_rows(kind, np.random.default_rng(1), (8,), 2), name="w")
    steps = leaf.parts[0] if isinstance(leaf, Sum) else leaf
    assert (steps.bits, steps.group_size, steps.scales.dtype.name) == (bits, group, scales)
    assert leaf.shape == (2 * BY_NAME[kind].elements, 8) and leaf.dtype == np.float32
    assert leaf.bits_per_weight == per_weight


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts(kind):
    raw = random_rows(kind, np.random.default_rng(2), (3, 2))
    leaf = decode(BY_NAME[kind], raw, name="w")
    assert leaf.shape == (3, BY_NAME[kind].elements, 2)
    np.testing.assert_array_equal(dense(leaf[1]).T, oracle(kind, raw[1]))


def test_golden_vector():
    raw = np.frombuffer(Q4_0_VECTOR, np.uint8)[None]
    leaf = decode(BY_NAME["Q4_0"], raw, name="w")
    assert np.asarray(leaf.scales).ravel().tolist() == [2.0]
    expected = 2.0 * (np.arange(32) // 2 + np.arange(32) % 2 - 8).clip(-8, 7)
    assert dense(leaf).ravel().tolist() == expected.tolist()
    assert quantize(np.arange(-16, 16, dtype=np.float32)[None], "Q4_0").tobytes() == Q4_0_VECTOR
    assert encode(leaf, "Q4_0").tobytes() == Q4_0_VECTOR


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_read_and_written_are_the_same_bytes(kind, seed):
    raw = random_rows(kind, np.random.default_rng(seed), (2, 3), blocks=2)
    leaf = decode(BY_NAME[kind], raw, name="w")
    assert isinstance(leaf, Quantized) and why_not(leaf, kind) is None
    np.testing.assert_array_equal(encode(leaf, kind), raw)


@pytest.mark.parametrize("bits, kind", [(1, "Q4_0"), (2, "Q4_0"), (3, "Q4_0"), (4, "Q4_0"), (5, "Q8_0"), (8, "Q8_0")])
@pytest.mark.parametrize("group", [32, 64, None])
def test_symmetric_leaves_keep_their_values(bits, kind, group):
    w = jax.random.normal(jax.random.key(bits), (128, 3))
    leaf = ej.quantize.RTN(bits=bits, group_size=group, symmetric=True).quantize(w)
    assert why_not(leaf, kind) is None
    np.testing.assert_array_equal(oracle(kind, encode(leaf, kind)), dense(leaf).T)


def test_whole_zero_points_keep_their_values():
    w = jax.random.normal(jax.random.key(0), (64, 3)) + 1
    leaf = ej.quantize.RTN(bits=4, group_size=32, symmetric=False).quantize(w)
    assert why_not(leaf, "Q4_0") == "its steps reach from -5 to 13, Q4_0 holds -8 to 7"
    assert why_not(leaf, "Q8_0") is None
    np.testing.assert_array_equal(oracle("Q8_0", encode(leaf, "Q8_0")), dense(leaf).T)


def leaf_of(
    n: int = 64, groups: int = 2, scale: float = 1.0, zeros: float | None = None, dtype=jnp.float32
) -> Quantized:
    codes, scales = jnp.zeros((n, 2), jnp.uint8), jnp.full((groups, 2), scale, dtype)
    points = None if zeros is None else jnp.full((groups, 2), zeros, jnp.float32)
    return Quantized.from_codes(codes, scales, points, bits=8, dtype=jnp.float32)


@pytest.mark.parametrize(
    "leaf, reason",
    [
        (leaf_of(groups=4), "its groups of 16 inputs are no multiple of the blocks of 32"),
        (leaf_of(n=40, groups=1), "its 40 inputs are no multiple of 32"),
        (leaf_of(scale=0.1), "its scales are no float16 numbers"),
        (leaf_of(scale=1e30), "its scales are no float16 numbers"),
        (leaf_of(zeros=0.25), "its zero points are no whole numbers"),
        (leaf_of(zeros=129.0), "its steps reach from -129 to -129, Q8_0 holds -128 to 127"),
        (leaf_of(zeros=1e9), "its zero points are no whole numbers"),
        (Sum(parts=(leaf_of(), leaf_of())), "a Sum is not one scale times whole numbers in each block"),
        (leaf_of(zeros=7.0), None),
    ],
)
def test_why_not(leaf, reason):
    assert why_not(leaf, "Q8_0") == reason


@pytest.mark.parametrize("kind, levels", [("Q8_0", 127), ("Q4_0", 8)])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_rounding_is_to_the_nearest_step(kind, levels, seed):
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(2, 64)) * 10.0 ** rng.integers(-3, 4, (2, 1))).astype(np.float32)
    back = oracle(kind, quantize(w, kind))
    peak = np.abs(w.reshape(2, 2, 32)).max(-1, keepdims=True).repeat(32, -1).reshape(2, 64)
    # Half a step; Q4_0 may clip the other sign by a whole one. The rest: the scale is rounded to float16.
    assert (np.abs(back - w) <= peak / levels * (0.5 if kind == "Q8_0" else 1.0) + 2.0**-10 * peak + 5e-6).all()


def test_rounding_of_halves_and_zeros():
    w = np.zeros((1, 64), np.float32)
    w[0, :5] = 127, 0.5, -0.5, 1.5, -2.5  # away from zero
    raw = quantize(w, "Q8_0")
    assert raw[0, 2:7].view(np.int8).tolist() == [127, 1, -1, 2, -3]
    assert raw[0, 34:].tolist() == [0] * 34
    assert oracle("Q4_0", quantize(np.zeros((1, 32), np.float32), "Q4_0")).tolist() == [[0.0] * 32]
    assert np.abs(oracle("Q8_0", quantize(np.full((1, 32), 1e-44, np.float32), "Q8_0"))).max() == 0


def test_rounding_refuses():
    with pytest.raises(CheckpointError, match="rows of 40 weights are no whole blocks of 32; write F16"):
        quantize(np.zeros((1, 40), np.float32), "Q8_0")
    with pytest.raises(CheckpointError, match="weights up to 1e[+]30 need scales beyond float16; write F32"):
        quantize(np.full((1, 32), 1e30, np.float32), "Q8_0")


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_not_finite(kind):
    for at in HALVES.get(kind, (0,)):
        for value in (np.nan, np.inf):
            raw = random_rows(kind, np.random.default_rng(3), (3,), 2)
            start = BY_NAME[kind].nbytes + at
            raw[2, start : start + 2] = np.array([value], np.float16).view(np.uint8)
            at_weight = BY_NAME[kind].elements
            with pytest.raises(
                CheckpointError, match=f"x: w has (scales|offsets) that .* row 2 at weight {at_weight};"
            ):
                decode(BY_NAME[kind], raw, name="x: w")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64"])
def test_plain_types(kind):
    values = np.arange(6).reshape(2, 3).astype(BY_NAME[kind].dtype)
    raw = values.view(np.uint8).reshape(2, -1)
    np.testing.assert_array_equal(decode(BY_NAME[kind], raw, name="w"), values.T)
    np.testing.assert_array_equal(decode(BY_NAME[kind], raw[0], name="w"), values[0])
    values[1, 2] = np.nan
    with pytest.raises(CheckpointError, match=r"x: w has values that are NaN or infinite, the first at \[1, 2\]; copy"):
        decode(BY_NAME[kind], values.view(np.uint8).reshape(2, -1), name="x: w")


def test_types_that_are_not_read():
    with pytest.raises(CheckpointError, match="x: w has type IQ2_S, which is not read; convert it to one of F32, F16"):
        decode(BY_NAME["IQ2_S"], np.zeros((1, 82), np.uint8), name="x: w")
    with pytest.raises(CheckpointError, match="x: w is a vector of type Q8_0; vectors are read as F32"):
        decode(BY_NAME["Q8_0"], np.zeros(34, np.uint8), name="x: w")


@pytest.mark.parametrize("kind", [*KINDS, "F16"])
@given(data=st.data())
@settings(max_examples=50)
def test_any_bits_are_refused_or_finite(kind, data):
    size = BY_NAME[kind].nbytes
    raw = np.frombuffer(data.draw(st.binary(min_size=4 * size, max_size=4 * size)), np.uint8).reshape(2, 2 * size)
    try:
        leaf = decode(BY_NAME[kind], raw, name="w")
    except CheckpointError:
        return
    values = dense(leaf)
    assert values.shape == (2 * BY_NAME[kind].elements, 2) and np.isfinite(values).all()
