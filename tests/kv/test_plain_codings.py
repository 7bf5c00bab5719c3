"""Integers by channel and by token, and KIVI, against loops in plain numpy; their bytes; slots; what is refused."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from effjax.errors import ConfigError
from effjax.kv import KIVI, IntKV
from effjax.kv.coding import fit
from effjax.kv.integer import PerChannel, PerToken


@jax.jit
def coded_and_back(coder, x):
    coded = coder.encode(x)
    return coded, coder.decode(coded)


def vectors(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1])) + 3).astype(np.float32)


def rounded(x, bits):
    """Numbers as min-max codes of `bits` bits give them back, from scales rounded to float16."""
    low = np.float32(np.float16(x.min()))
    step = np.float32(np.float16((x.max() - x.min()) / np.float32(2**bits - 1)))
    if step == 0:
        return np.full_like(x, low)
    return low + step * np.clip(np.rint((x - low) / step), 0, 2**bits - 1)


def close(found, wanted, x, bits):
    """Equal, but for numbers half way between two codes, which rounding may take to either."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    step = (x.max() - x.min()) / (2**bits - 1)
    assert found.shape == wanted.shape and np.isclose(found, wanted, atol=1e-4).mean() > 0.99
    assert np.abs(found - wanted).max() <= 1.01 * step + 1e-4


@settings(max_examples=5)
@given(bits=st.integers(1, 8), slots=st.integers(1, 7), group=st.sampled_from([None, 3, 6]), seed=st.integers(0, 99))
def test_per_token_equals_loops(bits, slots, group, seed):
    x = vectors((2, slots, 12), seed)
    coding = PerToken(bits=bits, head_dim=12, group_size=group)
    coded, found = coded_and_back(fit(coding, None), jnp.asarray(x))
    wanted = x.copy()
    width = group or 12
    for at in np.ndindex(2, slots, 12 // width):
        part = slice(at[2] * width, (at[2] + 1) * width)
        wanted[at[0], at[1], part] = rounded(x[at[0], at[1], part], bits)
    close(found, wanted, x, bits)
    assert coded.nbytes == 2 * slots * (-(-12 * bits // 8) + 12 // width * 4)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_per_channel_uses_the_range_of_the_calibration_text(bits):
    x, new = vectors((2, 40, 6)), vectors((3, 2, 10, 6), 1)
    coder = fit(PerChannel(bits=bits), jnp.asarray(x))
    wanted = new.copy()
    for h, c in np.ndindex(2, 6):
        low = np.float32(np.float16(x[h, :, c].min()))
        step = np.float32(np.float16(np.ptp(x[h, :, c]) / np.float32(2**bits - 1)))
        wanted[:, h, :, c] = low + step * np.clip(np.rint((new[:, h, :, c] - low) / step), 0, 2**bits - 1)
    close(coded_and_back(coder, jnp.asarray(new))[1], wanted, x, bits)
    assert coder.nbytes == 2 * 6 * 4
    assert coder.bits_per_channel((3, 2, 10, 6), tables=False) == 8 * -(-6 * bits // 8) / 6


@settings(max_examples=5)
@given(
    bits=st.sampled_from([2, 4]),
    slots=st.integers(0, 21),
    group=st.sampled_from([2, 4]),
    residual=st.sampled_from([0, 4, 8]),
    seed=st.integers(0, 99),
)
def test_kivi_equals_loops(bits, slots, group, residual, seed):
    x = vectors((2, slots, 8), seed)
    method = KIVI(bits=bits, head_dim=8, group_size=group, residual=residual)
    keys, found_keys = coded_and_back(fit(method.keys, None), jnp.asarray(x))
    values, found_values = coded_and_back(fit(method.values, None), jnp.asarray(x))
    whole = slots - slots % (residual or group)
    wanted = x.copy()
    for h, run, c in np.ndindex(2, whole // group, 8):
        part = slice(run * group, (run + 1) * group)
        wanted[h, part, c] = rounded(x[h, part, c], bits)
    scale = x if x.size else np.zeros(1)
    if x.size:
        close(found_keys, wanted, scale, bits)
    assert keys.nbytes == 2 * (whole * bits + whole // group * 8 * 4 + (slots - whole) * 8 * 4)
    coded = max(slots - residual, 0)
    wanted = x.copy()
    for h, t, g in np.ndindex(2, coded, 8 // group):
        part = slice(g * group, (g + 1) * group)
        wanted[h, t, part] = rounded(x[h, t, part], bits)
    if x.size:
        close(found_values, wanted, scale, bits)
    assert values.nbytes == 2 * (coded * (bits + 8 // group * 4) + min(residual, slots) * 8 * 4)


def test_bits_of_the_paper():
    """2 bits with groups of 32 are 3 with two 16-bit scales a group; the window counts in full."""
    shape = (1, 2, 4096, 64)
    method = KIVI(bits=2, head_dim=64, group_size=32, residual=128)
    assert fit(method.keys, None).bits_per_channel(shape) == 3.0
    share = 128 / 4096
    assert fit(method.values, None).bits_per_channel(shape) == pytest.approx(3 * (1 - share) + 16 * share)
    assert fit(method.keys, None).bits_per_channel((1, 2, 64, 64)) == 16.0, "fewer tokens than the window"
    int4 = IntKV(bits=4, head_dim=64)
    assert fit(int4.values, None).bits_per_channel(shape) == 4.5


def test_eight_bits_are_nearly_exact_and_constants_are():
    x = jnp.asarray(vectors((2, 64, 16)))
    method = IntKV(bits=8, head_dim=16)
    for coding in (method.keys, method.values, KIVI(bits=8, head_dim=16, residual=0).keys):
        coder = fit(coding, x)
        spread = float(jnp.max(x) - jnp.min(x))
        assert float(jnp.abs(coder.decode(coder.encode(x)) - x).max()) < spread / 255
        same = fit(coding, jnp.full_like(x, 2.5))
        np.testing.assert_array_equal(same.decode(same.encode(jnp.full_like(x, 2.5))), 2.5)


def test_slots_move_where_tokens_share_nothing():
    x = jnp.asarray(vectors((2, 64, 16)))
    slots = jnp.asarray([[3, 1, 63], [0, 7, 7]])
    for coding in (IntKV(bits=4, head_dim=16).keys, IntKV(bits=4, head_dim=16).values):
        coder = fit(coding, x)
        coded = coder.encode(x)
        moved = jnp.take_along_axis(coder.decode(coded), slots[..., None], 1)
        chex.assert_trees_all_equal(coder.decode(coded.take(slots)), moved)
        chex.assert_trees_all_equal(jax.jit(lambda c, x: c.encode(x))(coder, x), coded)
    with pytest.raises(ConfigError, match="cannot change places: successive tokens share scales.*evict before coding"):
        KIVI(head_dim=16).keys.encode(jnp.zeros((2, 128, 16))).take(slots)
    with pytest.raises(ConfigError, match="cannot change places"):
        KIVI(head_dim=16).values.encode(jnp.zeros((2, 128, 16))).take(slots)


def test_refused():
    for make, message in (
        (lambda: KIVI(head_dim=64, group_size=32, residual=48), "residual=48 is no multiple of group_size=32"),
        (lambda: KIVI(head_dim=48, group_size=32, residual=0), "group_size=32 does not divide head_dim=48"),
        (lambda: KIVI(head_dim=64, bits=9), "bits=9: choose 1 to 8"),
        (lambda: KIVI(head_dim=0), "head_dim=0: choose a whole number of at least 1"),
        (lambda: KIVI(head_dim=64, group_size=0, residual=0), "group_size=0: choose a whole number of at least 1"),
        (lambda: IntKV(head_dim=64, bits=True), "bits=True: choose 1 to 8"),
        (lambda: PerToken(head_dim=64, residual=-1), "residual=-1: choose a whole number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for coding in (IntKV(head_dim=16).values, KIVI(head_dim=16).keys):
        with pytest.raises(ConfigError, match=r"the vectors have shape \(2, 4, 8\); write head_dim=8"):
            coding.encode(jnp.zeros((2, 4, 8)))
    with pytest.raises(ConfigError, match=r"learns from \[kv_heads, tokens, head_dim\], found shape \(1, 2, 4, 8\)"):
        PerChannel().learn(jnp.zeros((1, 2, 4, 8)))
