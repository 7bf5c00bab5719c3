"""The native `decode_attention` against float64: every variant, what it holds, odd shapes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.kv import Importance
from effjax.ops.attention import make_question as question
from kernels_cpu import variants
from kernels_cpu.decode_attention import AMONG, decode_attention, why_not
from tests.ops.attention_oracle import assert_answers, random_case

RUNNABLE = variants.runnable("decode_attention", AMONG)


def answer(case, variant="auto", asked=True):
    sums = case.asked if asked else None
    a = question("test", case.q, case.k, case.v, case.length, case.start, sums, case.table, None, case.importance)
    assert why_not(a) == ""
    return jax.jit(lambda a: decode_attention(a, variant=variant))(a)


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize(
    ("keys", "values", "dtype"),
    [
        ("dense", "dense", "float32"),
        ("dense", "dense", "bfloat16"),
        ("channel-8", "token-8", "float32"),
        ("channel-4", "token-4", "float32"),
        ("dense", "token-4", "float32"),
    ],
)
def test_every_variant_and_form(variant, keys, values, dtype):
    case = random_case(batch=3, group=7, slots=150, head_dim=96, keys=keys, values=values, dtype=dtype, window=True)
    assert_answers(case, answer(case, variant), 4e-3 if dtype == "bfloat16" else 2e-6)


@settings(max_examples=8)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 9),
    slots=st.integers(1, 400),
    sixteens=st.integers(1, 9),
    variant=st.sampled_from(RUNNABLE),
    asked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_odd_shapes(batch, heads, group, slots, sixteens, variant, asked, seed):
    case = random_case(batch, heads, group, slots, 16 * sixteens, window=True, seed=seed)
    assert_answers(case, answer(case, variant, asked), 2e-6)


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize(("page", "keys"), [(1, "dense"), (16, "dense"), (40, "channel-8")])
def test_pages(variant, page, keys):
    """What the table says behind the last page that is needed does not matter."""
    case = random_case(batch=4, slots=page * 6, head_dim=32, page=page, keys=keys, window=True)
    assert_answers(case, answer(case, variant), 2e-6)


@settings(max_examples=8)
@given(
    importance=st.sampled_from(
        [Importance(quantile=0.9), Importance(quantile=0.05, peaked=True), Importance(multiple=1.5)]
    ),
    slots=st.integers(1, 400),
    values=st.sampled_from(["dense", "token-8"]),
    variant=st.sampled_from(RUNNABLE),
    seed=st.integers(0, 99),
)
def test_pivotal_slots_are_counted(importance, slots, values, variant, seed):
    case = random_case(2, 2, 5, slots, 32, values=values, window=True, seed=seed)
    case.importance = importance
    assert_answers(case, answer(case, variant), 2e-6)


def test_equal_weights_are_all_pivotal_or_none():
    """Above a quantile is none of them, above half the mean are all."""
    case = random_case(slots=70)
    case.q = 0 * case.q
    for importance in (Importance(quantile=0.9), Importance(multiple=0.5)):
        case.importance = importance
        assert_answers(case, answer(case), 2e-6)


def test_large_logits_do_not_overflow():
    case = random_case(slots=70)
    case.q = case.q * 300
    assert_answers(case, answer(case), 1e-4)


def test_slots_that_a_row_does_not_see_are_not_read():
    case = random_case(slots=100, window=True)
    slot = np.arange(100)[:, None]
    seen = (slot >= np.asarray(case.start)[..., None, None]) & (slot < np.asarray(case.length)[..., None, None])
    case.k, case.v = (jnp.where(seen, x, jnp.nan) for x in (case.k, case.v))
    assert_answers(case, answer(case), 2e-6)


def test_maps_over_caches():
    case = random_case(slots=40)
    keys = jnp.stack([case.k, 2 * case.k])
    a = question("test", case.q, case.k, case.v, case.length, case.start, case.asked, None, None)
    ys, sums = jax.vmap(lambda k: decode_attention(question("test", a.q, k, a.v, a.length, None, a.asked, None, None)))(
        keys
    )
    for i in range(2):
        case.keys = np.asarray(keys[i], np.float64)
        assert_answers(case, (ys[i], sums[i]), 2e-6)


def test_what_is_refused_says_why():
    def refused(message, **shape):
        with pytest.raises(ConfigError, match=message):
            random_case(**shape).answer("cpu")

    refused("head_dim 24: the kernel takes multiples of 16", head_dim=24)
    refused("keys in float16: the kernel takes float32 and bfloat16", dtype="float16")
    refused("keys coded by CQ-8c8b: the kernel takes integers", keys="cq-8-8")
    refused(r"values coded by PerToken\(bits=3.*takes 8 bits, or 4", values="token-3")
    refused("the kernel takes pages of dense values", slots=32, page=16, values="token-8")
    case = random_case(slots=20)
    with pytest.raises(ValueError, match="decode_attention: unknown variant 'sse'"):
        answer(case, "sse")
