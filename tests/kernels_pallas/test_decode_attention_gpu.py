"""The Hopper kernel of `decode_attention` lowers for CUDA without a GPU: decoders' widths, odd shapes, and pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.ops.attention import make_question as question
from kernels_pallas.decode_attention.gpu import Tile, choose_tile, decode_attention, shared_bytes, why_not
from kernels_pallas.decode_attention.gpu_slots import plane
from kernels_pallas.gpu_packed import column_pairs
from kernels_pallas.gpu_tile import SHARED_BYTES
from kernels_pallas.shapes import MODELS
from tests.ops.attention_oracle import random_case

STRUCT = jax.ShapeDtypeStruct


def struct(batch, heads, group, slots, head_dim, *, dtype=jnp.bfloat16, page=None, asked=True):
    """A question of shapes alone."""
    shape = (batch, heads, slots, head_dim) if page is None else (99, heads, page, head_dim)
    q, k, place = (
        STRUCT((batch, heads, group, head_dim), dtype),
        STRUCT(shape, dtype),
        STRUCT((batch, heads), jnp.int32),
    )
    sums = STRUCT((batch,), jnp.float32) if asked else None
    table = None if page is None else STRUCT((batch, slots // page), jnp.int32)
    return jax.eval_shape(lambda *x: question("test", *x, None), q, k, k, place, place, sums, table)


def lower(a, tile=None):
    program = jax.jit(lambda a: decode_attention(a, tile=tile)).trace(a)
    y, *received = program.jaxpr.out_avals
    assert (y.shape, y.dtype) == (a.q.shape, a.q.dtype)
    assert [x.shape for x in received] == ([] if a.asked is None else [(*a.q.shape[:2], a.slots)])
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize("page", [None, 16, 64, 256])
@pytest.mark.parametrize("model", MODELS)
def test_every_decoder(model, page):
    m = MODELS[model]
    lower(struct(4, m.kv_heads, m.heads // m.kv_heads, 4096, m.head_dim, page=page))


@settings(max_examples=6)
@given(
    batch=st.integers(1, 5),
    heads=st.integers(1, 5),
    group=st.integers(1, 64),
    eights=st.integers(1, 400),
    sixteens=st.integers(1, 16),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
    asked=st.booleans(),
)
def test_odd_shapes(batch, heads, group, eights, sixteens, dtype, asked):
    lower(struct(batch, heads, group, 8 * eights, 16 * sixteens, dtype=dtype, asked=asked))


CODES = {
    "int8": dict(slots=1000, head_dim=128, keys="channel-8", values="token-8"),
    "int4": dict(slots=256, head_dim=64, keys="channel-4", values="token-4"),
    "int2 keys": dict(slots=64, head_dim=128, keys="channel-2"),
    "int8 values": dict(slots=64, head_dim=32, values="token-8", dtype="float16"),
    "pages": dict(slots=256, head_dim=64, page=64, keys="channel-4", values="token-8"),
}


@pytest.mark.parametrize("name", CODES)
def test_codes(name):
    a = coded(**CODES[name])
    assert why_not(a) == ""
    lower(a)
    tile = choose_tile(a)
    assert tile.stages >= 2 and shared_bytes(a, tile) <= SHARED_BYTES


def coded(**shape):
    case = random_case(**{"dtype": "bfloat16"} | shape)
    return question("test", case.q, case.k, case.v, case.length, case.start, case.asked, case.table, None)


def test_planes_are_the_codes_less_their_centre():
    """For every byte, whatever its neighbour holds."""
    codes = np.random.default_rng(0).permutation(np.arange(512) % 256).astype(np.uint8)
    words = column_pairs(jnp.asarray(codes)[None])
    for bits in (2, 4, 8):
        found = jnp.stack([plane(words[0], p, bits) for p in range(16 // bits)], axis=-1)
        expected = (codes[:, None] >> np.arange(0, 8, bits)) % 2**bits - 2.0 ** (bits - 1)
        assert found.dtype == jnp.bfloat16
        assert np.array_equal(np.asarray(found, np.float64).ravel(), expected.ravel())


def test_a_chosen_tile_fills_the_gpu_and_fits_its_multiprocessors():
    for m in MODELS.values():
        for batch, slots in ((1, 256), (1, 32768), (16, 4096), (128, 1024)):
            for head_dim in (16, m.head_dim, 256):
                a = struct(batch, m.kv_heads, m.heads // m.kv_heads, slots, head_dim)
                tile = choose_tile(a)
                assert tile.stages >= 2 and shared_bytes(a, tile) <= SHARED_BYTES
                assert tile.splits == 1 or slots // 64 // tile.splits >= 4
    alone = struct(1, 8, 4, 32768, 128)
    assert choose_tile(alone) == Tile(splits=33, stages=2)  # 264 blocks of threads for 132 multiprocessors
    assert shared_bytes(alone, choose_tile(alone)) <= SHARED_BYTES // 2


def test_what_is_refused_says_why():
    a = struct(2, 2, 4, 64, 64)
    assert why_not(a) == ""

    def reason(**shape):
        sizes = dict(batch=2, heads=2, group=4, slots=64, head_dim=64) | shape
        return why_not(struct(**sizes))

    assert reason(dtype=jnp.float32) == (
        "queries in float32: the GPU kernel takes bfloat16 and float16; use implementation='reference'"
    )
    assert "head_dim 24: a tensor core takes multiples of 16 up to 256" in reason(head_dim=24)
    assert "65 query heads a key head: a tensor core instruction has 64 rows" in reason(group=65)
    assert "60 slots: they are copied 8 at a time" in reason(slots=60)
    assert "pages of 24 slots: a step takes 64" in reason(slots=96, page=24)
    narrow, values = (
        coded(slots=64, head_dim=32, **codes) for codes in ({"keys": "channel-4"}, {"values": "channel-8"})
    )
    assert "keys coded by PerChannel(bits=4), 32 wide: the kernel takes 2, 4 or 8 bits" in why_not(narrow)
    assert "values coded by PerChannel(bits=8): the GPU kernel takes PerToken; use implementation='blocked'" in why_not(
        values
    )
    pages = coded(slots=64, head_dim=64, page=16, values="token-8")
    assert "pages of 16 slots: the scales of values are copied 64 at a time" in why_not(pages)
    assert "4 slots a page: they are copied 8 at a time" in reason(slots=96, page=4)
    mixed = dataclasses.replace(a, v=STRUCT(a.v.shape, jnp.float16))
    assert "values in float16, queries in bfloat16: dense ones must be of the queries' dtype" in why_not(mixed)
    with pytest.raises(
        ConfigError, match="implementation='gpu' does not take this: keys coded by CQ-8c8b: .*'blocked'"
    ):
        random_case(slots=64, keys="cq-8-8", dtype="bfloat16").answer("gpu")
    with pytest.raises(ValueError, match="splits=0, stages=2: both are at least 1"):
        Tile(splits=0, stages=2)
