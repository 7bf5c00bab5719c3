"""The TPU's `decode_attention` in the simulator of a TPU: ragged lengths, windows, codes, pages, what is not read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.ops.attention import make_question as question
from kernels_pallas.decode_attention.tpu import choose_block, decode_attention, vmem_bytes, why_not
from kernels_pallas.decode_attention.tpu_slots import _half_to_float, _two_halves, bfloat16_parts
from tests.ops.attention_oracle import assert_answers, random_case

BFLOAT16, FLOAT32 = 8e-3, 3e-6  # a rounding of weights and outputs; sums in float32


def operands(case, asked=True):
    sums = case.asked if asked else None
    return question("test", case.q, case.k, case.v, case.length, case.start, sums, case.table, None)


@functools.partial(jax.jit, static_argnames="block")
def simulated(a, block=None):
    return decode_attention(a, block=block, interpret=True)


def check(tolerance, *, block=128, asked=True, **shape):
    case = random_case(**shape)
    a = operands(case, asked)
    assert why_not(a) == ""
    answer = simulated(a, block=None if case.table is not None else block)
    assert (answer[1] is None) is not asked
    assert_answers(case, answer, tolerance)


def test_ragged_lengths_and_windows_in_several_blocks():
    """The last block reaches behind the last slot, where the simulator has not-a-numbers."""
    check(FLOAT32, batch=3, slots=300, window=True)


def test_bfloat16_keys_as_they_lie_without_sums():
    check(BFLOAT16, slots=300, head_dim=128, dtype="bfloat16", window=True, asked=False)


@pytest.mark.parametrize(
    ("keys", "values", "head_dim", "dtype"),
    [
        ("channel-8", "token-8", 128, "float32"),
        ("channel-4", "token-4", 64, "bfloat16"),
        ("cq-8-8", "cq-4-4", 32, "float32"),
        ("channel-2", "cq-16-2", 16, "float32"),
    ],
)
def test_codes(keys, values, head_dim, dtype):
    """Scales have 16 bits or 24, so that what is rounded are bfloat16 outputs, and sums in float32."""
    check(FLOAT32 if dtype == "float32" else 4e-3, slots=300, head_dim=head_dim, dtype=dtype, keys=keys, values=values)


@pytest.mark.parametrize(
    ("page", "slots", "keys", "values"), [(16, 112, "dense", "dense"), (128, 256, "channel-4", "cq-8-8")]
)
def test_pages(page, slots, keys, values):
    """A table may hold anything behind the last page that a row needs."""
    check(FLOAT32, batch=3, slots=slots, page=page, keys=keys, values=values, window=True)


@settings(max_examples=2)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.integers(1, 9),
    slots=st.integers(1, 400),
    head_dim=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_odd_shapes(batch, heads, group, slots, head_dim, seed):
    check(FLOAT32, batch=batch, heads=heads, group=group, slots=slots, head_dim=head_dim, window=True, seed=seed)


def test_blocks_that_a_row_does_not_see_are_not_used():
    case = random_case(slots=512, window=True)
    case.length, case.start = jnp.array([[129, 256], [200, 0]]), jnp.array([[128, 130], [199, 0]])
    block = np.arange(512)[:, None] // 128
    case.k, case.v = (jnp.where(block == 1, x, jnp.nan) for x in (case.k, case.v))
    assert_answers(case, simulated(operands(case), block=128), FLOAT32)


def test_half_precision_is_read_exactly():
    """Also the smallest numbers, which have no leading one: steps of values that are close to each other."""
    halves = np.arange(0, 2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)][None, :, None]
    words = _two_halves(jnp.asarray(halves), jnp.asarray(halves[:, ::-1]))
    assert np.array_equal(_half_to_float(words)[0, 0], halves[0, :, 0].astype(np.float32))
    assert np.array_equal(_half_to_float(words >> 16)[0, 0], halves[0, ::-1, 0].astype(np.float32))


def test_parts_add_up():
    x = jnp.asarray([1 / 3, -3e37, 1e-30, 0.0, 255 / 256 + 2**-20])
    assert jnp.array_equal(sum(p.astype(jnp.float32) for p in bfloat16_parts(x, 3)), x)


LOWERED = {
    "dense": dict(slots=2000, head_dim=128, dtype="bfloat16"),
    "int8": dict(slots=2048, head_dim=128, dtype="bfloat16", keys="channel-8", values="token-8"),
    "int4": dict(slots=2000, head_dim=128, keys="channel-4", values="token-4"),
    "codebooks": dict(slots=512, head_dim=64, keys="cq-8-8", values="cq-4-4"),
    "pages": dict(slots=256, page=32, head_dim=128, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_a_tpu(name):
    case = random_case(**LOWERED[name])
    text = jax.jit(case.answer).trace().lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1 and "decode_attention" in text


def test_a_block_is_a_step_worth_its_overhead():
    """Half a megabyte of keys and values, not more than the cache, whole pages."""
    assert choose_block(operands(random_case(1, 1, slots=8192, head_dim=128, dtype="bfloat16"))) == 1024
    assert choose_block(operands(random_case(1, 1, slots=130, head_dim=128))) == 256
    assert choose_block(operands(random_case(1, 4, slots=960, page=16, head_dim=128))) == 16 * 16
    assert choose_block(operands(random_case(1, 1, slots=4096, page=2048, head_dim=128))) == 2048


def test_logits_of_more_slots_take_more_vector_memory():
    short, long = (operands(random_case(1, 1, slots=n)) for n in (4096, 8192))
    assert vmem_bytes(long, 1024) - vmem_bytes(short, 1024) == 4 * (8 * 1024 * 4)


def test_what_is_refused_says_why():
    def reason(**shape):
        return why_not(operands(random_case(**shape)))

    assert "queries in float16: a TPU multiplies bfloat16 and float32; use implementation='blocked'" in reason(
        dtype="float16"
    )
    assert "keys coded by PerChannel(bits=3): whole codes must fill a byte" in reason(keys="channel-3")
    assert "values coded by PerChannel(bits=4): the kernel takes PerToken and CQ" in reason(values="channel-4")
    assert "pages of 4 slots: float32 fills registers of 8" in reason(slots=16, page=4)
    assert "pages of 64 slots: values so held need a multiple of 128" in reason(slots=128, page=64, values="token-4")
    with pytest.raises(ConfigError, match="implementation='tpu' does not take this: queries in float16"):
        random_case(dtype="float16").answer("tpu")
    a = operands(random_case(1, 1, slots=8, head_dim=8))
    many = jax.ShapeDtypeStruct((1, 1, 2**20, 8), jnp.float32)
    assert "1048576 slots take" in why_not(dataclasses.replace(a, k=many, v=many))
