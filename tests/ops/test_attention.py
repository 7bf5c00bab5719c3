"""`decode_attention` in plain JAX against float64: all slots at once and block by block, dense, coded and in pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.errors import ConfigError
from effjax.kv import KIVI, Importance
from effjax.kv.coding import Coder
from effjax.ops import CodedSlots, decode_attention, paged_decode_attention
from effjax.ops.attention import block_slots, choose
from effjax.ops.attention_blocks import Question, blocked
from tests.ops.attention_oracle import assert_answers, exact, random_case

PLAIN = ("reference", "blocked", "either")
CODES = (("channel-8", "token-8"), ("channel-4", "token-4"), ("cq-8-8", "cq-4-4"), ("dense", "token-3"))


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("window", [False, True])
def test_ragged_lengths_and_windows(implementation, window):
    case = random_case(batch=3, window=window)
    assert_answers(case, case.answer(implementation), 1e-6)


@settings(max_examples=6)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 7),
    slots=st.integers(1, 200),
    head_dim=st.integers(1, 40),
    window=st.booleans(),
    implementation=st.sampled_from(PLAIN),
    seed=st.integers(0, 99),
)
def test_odd_shapes(batch, heads, group, slots, head_dim, window, implementation, seed):
    case = random_case(batch, heads, group, slots, head_dim, window=window, seed=seed)
    assert_answers(case, case.answer(implementation), 2e-6)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_floats(implementation, dtype):
    """Weights are rounded to the dtype of the values, and so is the output."""
    case = random_case(dtype=dtype)
    assert_answers(case, case.answer(implementation), {"bfloat16": 8e-3, "float16": 1e-3}[dtype])


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(("keys", "values"), CODES)
def test_codes(implementation, keys, values):
    case = random_case(keys=keys, values=values, window=True)
    assert_answers(case, case.answer(implementation), 1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(("keys", "values"), [("dense", "dense"), ("channel-4", "cq-8-8")])
def test_pages(implementation, keys, values):
    case = random_case(batch=3, slots=48, page=8, keys=keys, values=values, window=True)
    assert_answers(case, case.answer(implementation), 1e-6)


@pytest.mark.parametrize("implementation", [*PLAIN, None])
@pytest.mark.parametrize(
    "importance", [Importance(quantile=0.9), Importance(quantile=0.3, peaked=True), Importance(multiple=2.0)]
)
def test_pivotal_slots_are_counted(implementation, importance):
    case = random_case(batch=3, slots=700, window=True)
    case.importance = importance
    assert_answers(case, case.answer(implementation), 1e-6)


def question(case, asked=True):
    return Question(
        q=case.q,
        k=case.k,
        v=case.v,
        start=case.start,
        length=case.length,
        asked=case.asked if asked else None,
        table=case.table,
        scale=0.25,
    )


@pytest.mark.parametrize("block", [1, 32, 64, 150, 999])
def test_any_block_gives_the_same(block):
    case = random_case(window=True)
    assert_answers(case, jax.jit(blocked, static_argnums=1)(question(case), block), 1e-6)


def test_blocks_that_no_row_sees_are_not_read():
    """Not-a-numbers beyond the longest row's last block, and before the first one that any row sees, go unnoticed."""
    case = random_case(slots=256)
    case.length, case.start = jnp.array([[70, 100], [90, 65]]), jnp.array([[64, 64], [70, 65]])
    spoiled = jnp.where(jnp.arange(256)[:, None] // 64 == 1, case.k, jnp.nan)
    case.k = spoiled
    y, received = jax.jit(blocked, static_argnums=1)(question(case), 64)
    case.k = case.keys
    assert_answers(case, (y, received), 1e-6)


@pytest.mark.parametrize(("length", "blocks"), [(190, True), (194, False)])
def test_either_goes_by_blocks_where_few_slots_are_filled(length, blocks):
    """Told apart by what is never read in blocks."""
    case = random_case(slots=512, head_dim=64)
    case.length = jnp.full((2, 2), length)
    case.values = np.where(np.arange(512)[:, None] < 500, case.values, np.inf)
    case.v = jnp.asarray(case.values, jnp.float32)
    y, _ = case.answer("either")
    assert bool(jnp.isfinite(y).all()) is blocks


def test_what_is_chosen_for_a_cpu():
    def chosen(**shape):
        return choose("cpu", question(random_case(**shape)))

    assert chosen(slots=64) == chosen(slots=64, dtype="bfloat16") == "cpu"
    assert chosen(slots=64, head_dim=32, keys="channel-4", values="token-8") == "cpu"
    assert chosen(slots=64, keys="channel-4") == chosen(slots=64, values="cq-8-8") == "blocked"
    assert chosen(slots=512, head_dim=24) == "either"
    assert chosen(slots=500, head_dim=24) == chosen(slots=512, dtype="float16") == "reference"
    assert chosen(slots=64, page=16) == "cpu"
    assert chosen(slots=64, head_dim=24, page=16) == "blocked"


def test_what_is_chosen_for_accelerators(monkeypatch):
    def chosen(platform, **shape):
        return choose(platform, question(random_case(**shape)))

    assert chosen("tpu") == chosen("tpu", keys="channel-4", values="cq-8-8") == "tpu"
    assert chosen("tpu", dtype="float16") == "reference"
    assert chosen("tpu", keys="channel-3") == "blocked"
    assert chosen("tpu", head_dim=128, slots=64, page=16) == "tpu"
    assert chosen("tpu", head_dim=64, slots=64, page=16) == "reference"
    fitting = dict(slots=64, dtype="bfloat16")
    assert chosen("cuda", **fitting) == "reference"  # no GPU is here
    monkeypatch.setattr("kernels_pallas.decode_attention.gpu.no_hopper", lambda: "")
    assert chosen("cuda", **fitting) == chosen("cuda", page=16, **fitting) == "gpu"
    assert chosen("cuda", slots=64) == "reference"
    assert chosen("cuda", keys="channel-4", **fitting) == "blocked"
    counting = dataclasses.replace(question(random_case(**fitting)), counts=Importance(quantile=0.9))
    assert choose("cuda", counting) == choose("tpu", counting) == "reference" and choose("cpu", counting) == "cpu"


def test_sums_are_left_out_when_nothing_is_asked():
    case = random_case()
    for implementation in (*PLAIN, None):
        y, received = case.answer(implementation, asked=False)
        assert received is None
        assert_answers(case, (y, None), 1e-6)


def test_another_scale():
    case = random_case()
    assert_answers(case, case.answer(scale=0.7), 1e-6, scale=0.7)


def test_what_is_read_does_not_grow_with_the_slots_of_a_coded_cache():
    """Block by block, no dense copy of the cache is held."""
    case = random_case(batch=1, heads=1, slots=8192, head_dim=32, keys="channel-4", values="token-4")
    dense = case.keys.size * 4

    def temporary(implementation):
        program = jax.jit(lambda q, k, v, n: decode_attention(q, k, v, n, implementation=implementation))
        return program.lower(case.q, case.k, case.v, case.length).compile().memory_analysis().temp_size_in_bytes

    assert temporary("reference") > 2 * dense
    assert temporary("blocked") < dense


def test_maps_over_any_operand():
    case = random_case()
    keys = jnp.stack([case.k, 2 * case.k])
    ys, sums = jax.vmap(lambda k: decode_attention(case.q, k, case.v, case.length, asked=case.asked))(keys)
    for i in range(2):
        case.keys = np.asarray(keys[i], np.float64)
        assert_answers(case, (ys[i], sums[i]), 1e-6)


def test_spread_over_devices_the_compiler_gets_the_reference():
    case = random_case(batch=8, slots=64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    q, k, v, length, asked = jax.device_put((case.q, case.k, case.v, case.length, case.asked), rows)
    program = jax.jit(lambda *a: decode_attention(*a[:4], asked=a[4])).lower(q, k, v, length, asked)
    assert "stablehlo.while" not in program.as_text()
    assert_answers(case, program.compile()(q, k, v, length, asked), 1e-6)


def test_each_device_of_shard_map_has_its_own_kernel():
    case = random_case(batch=8, slots=512)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(q, k, v, length, asked):
        return decode_attention(q, k, v, length, asked=asked)

    spread = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    operands = (case.q, case.k, case.v, case.length, case.asked)
    assert "EffjaxDecodeAttention" in spread.lower(*operands).as_text()
    assert_answers(case, spread(*operands), 1e-6)


def test_the_reference_has_gradients():
    case = random_case(slots=9)

    def total(q):
        return decode_attention(q, case.k, case.v, case.length, implementation="reference")[0].sum()

    found, step = jax.grad(total)(case.q), np.zeros(case.q.shape)
    step[1, 0, 2, 3] = 1e-4
    moved = []
    for sign in (1, -1):
        other = random_case(slots=9)
        other.q = np.asarray(case.q, np.float64) + sign * step
        moved.append(exact(other)[0].sum())
    np.testing.assert_allclose(found[1, 0, 2, 3], (moved[0] - moved[1]) / 2e-4, rtol=1e-3, atol=1e-5)


def test_a_block_fits_the_cache_and_is_not_tiny():
    small, large = question(random_case(1, 1, 1, 8, 64)), question(random_case(8, 8, 1, 8, 64))
    assert block_slots(small) == 512
    assert block_slots(large) == 64


def refused(message, *, k=None, v=None, length=None, **options):
    case = random_case(slots=8)
    with pytest.raises(ConfigError, match=message):
        decode_attention(
            case.q,
            case.k if k is None else k,
            case.v if v is None else v,
            case.length if length is None else length,
            **options,
        )


def test_what_is_refused_says_why():
    refused(r"k must be \[2, 2, slots, 16\] for q \[2, 2, 4, 16\], found \[2, 2, 8, 32\]", k=jnp.ones((2, 2, 8, 32)))
    refused(r"k and v hold different slots, \[2, 2, 8, 16\] and \[2, 2, 9, 16\]", v=jnp.ones((2, 2, 9, 16)))
    refused("k holds int8; codes go with their coder, as a CodedSlots", k=jnp.ones((2, 2, 8, 16), jnp.int8))
    refused(r"length must be int32 \[2, 2\], found int32 \[2\]", length=jnp.ones(2, jnp.int32))
    refused(r"length must be int32 \[2, 2\], found float32", length=jnp.ones((2, 2)))
    refused(r"asked must be \[2\], one number a row, found \[4\]", asked=jnp.ones(4))
    refused("scale must be a finite number, found inf", scale=float("inf"))
    refused("no implementation 'xla'; there are reference, blocked, either, cpu, tpu, gpu", implementation="xla")
    with pytest.raises(ConfigError, match=r"q must be \[batch, kv_heads, group, head_dim\], found \[2, 4\]"):
        decode_attention(jnp.ones((2, 4)), jnp.ones(1), jnp.ones(1), jnp.ones(1))


def test_what_pages_refuse_says_why():
    q, pages, table = jnp.ones((2, 2, 4, 16)), jnp.ones((5, 2, 8, 16)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ConfigError, match=r"page_table must be \[2, pages\], found \(3,\)"):
        paged_decode_attention(q, pages, pages, table[0], jnp.ones(2, jnp.int32))
    with pytest.raises(ConfigError, match=r"length must be \[2\], found \[2, 2\]"):
        paged_decode_attention(q, pages, pages, table, jnp.ones((2, 2), jnp.int32))
    with pytest.raises(ConfigError, match=r"v must be \[num_pages, 2, slots, 16\]"):
        paged_decode_attention(q, pages, pages[:, :1], table, jnp.ones(2, jnp.int32))


def test_codes_that_do_not_stand_alone_are_refused():
    x = jax.random.normal(jax.random.key(0), (2, 2, 64, 16))
    keys = KIVI(bits=2, head_dim=16).keys
    coder = Coder(coding=keys, tables=keys.learn(x[0]))
    refused("where successive tokens share scales", k=CodedSlots(coded=coder.encode(x), coder=coder), v=x)
