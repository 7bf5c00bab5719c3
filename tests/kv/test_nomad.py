"""NoMAD: codes, tables and sums against plain loops, attention against numpy, errors of quantizers against theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.kv import nomad, nomad_attention
from effjax.kv.nomad import NoMAD, QueryTable
from effjax.kv.nomad_attention import NomadKeys, init_keys

# One program each; the tests of messages call what is inside.
encode, decode, from_blocks, to_blocks = map(jax.jit, (nomad.encode, nomad.decode, nomad.from_blocks, nomad.to_blocks))
query_table, lookup_sums, lookup_logits = map(jax.jit, (nomad.query_table, nomad.lookup_sums, nomad.lookup_logits))
code_keys, append_key = map(jax.jit, (nomad_attention.code_keys, nomad_attention.append_key))
decoded_keys, take_keys = map(jax.jit, (nomad_attention.decoded_keys, nomad_attention.take_keys))
attention = jax.jit(nomad_attention.nomad_attention, static_argnames=("with_received", "implementation"))


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def nibble(codes, slot, sub):
    """The code of a slot, from the layout as the paper draws it."""
    block, place = divmod(slot, 32)
    byte = int(codes[block, sub, place % 16])
    return byte >> 4 if place >= 16 else byte & 15


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_sub", "low", "high"), [(1, 0.0085, 0.0115), (2, 0.105, 0.125), (4, 0.32, 0.37)])
def test_errors_of_normal_keys_are_those_of_theory(d_sub, low, high):
    """Sixteen levels of Lloyd and Max leave 0.0095 of the variance; 0.11 to 0.12 for pairs, a third for fours."""
    keys = normal(1, 12_000, 4, seed=d_sub)
    books = NoMAD(d_sub=d_sub, iterations=60).learn(jnp.asarray(keys), key=jax.random.key(d_sub))
    assert books.shape == (1, 4 // d_sub, 16, d_sub) and books.dtype == jnp.float32
    other = normal(1, 8_000, 4, seed=9)
    left = np.square(np.asarray(decode(encode(other, books), books)) - other).mean() / np.square(other).mean()
    assert low < left < high


def test_fisher_moves_centres_to_the_weighted_means_of_their_members():
    keys, grads = normal(2, 900, 8), 1e-25 * normal(2, 900, 8, seed=1) ** 3
    plain = NoMAD(d_sub=4, iterations=9).learn(jnp.asarray(keys), key=jax.random.key(0))
    fisher = NoMAD(d_sub=4, iterations=9, fisher=True).learn(
        jnp.asarray(keys), jnp.asarray(grads), key=jax.random.key(0)
    )
    codes, squares = np.asarray(from_blocks(encode(keys, plain))), np.square(grads.astype(np.float64))
    for head, sub, entry in np.ndindex(2, 2, 16):
        here, run = codes[head, :900, sub] == entry, slice(4 * sub, 4 * sub + 4)
        least = 1e-3 * squares[head, :, run].mean()
        weights = squares[head, here, run] + least
        mean = (weights * keys[head, here, run]).sum(0) / weights.sum(0)
        np.testing.assert_allclose(fisher[head, sub, entry], mean, rtol=2e-4, atol=2e-5)


def test_without_any_gradient_centres_stay():
    keys = jnp.asarray(normal(1, 500, 4))
    found = [
        NoMAD(d_sub=2, iterations=40, fisher=fisher).learn(keys, jnp.zeros_like(keys), key=jax.random.key(0))
        for fisher in (False, True)
    ]
    np.testing.assert_array_equal(found[0], found[1])


# ---- codes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(
    d_sub=st.sampled_from([1, 2, 4]),
    subs=st.sampled_from([1, 3, 5]),
    slots=st.sampled_from([1, 31, 33, 70]),
    seed=st.integers(0, 99),
)
def test_codes_are_nearest_centres_and_lie_as_the_paper_says(d_sub, subs, slots, seed):
    keys, books = normal(2, 2, slots, subs * d_sub, seed=seed), normal(2, subs, 16, d_sub, seed=seed)
    codes = np.asarray(encode(keys, books))
    assert codes.shape == (2, 2, -(-slots // 32), subs, 16) and codes.dtype == np.uint8
    runs = keys.reshape(2, 2, slots, subs, 1, d_sub).astype(np.float64)
    away = np.square(runs - books[:, None]).sum(-1)
    for row, head, slot, sub in np.ndindex(2, 2, slots, subs):
        code = nibble(codes[row, head], slot, sub)
        assert away[row, head, slot, sub, code] <= away[row, head, slot, sub].min() + 1e-5
    flat = np.asarray(from_blocks(codes))
    assert not flat[:, :, slots:].any()
    np.testing.assert_array_equal(to_blocks(flat), codes)


def test_a_centre_is_coded_as_itself():
    books = normal(1, 3, 16, 2)
    index = np.random.default_rng(0).integers(0, 16, (40, 3))
    keys = books[0, np.arange(3), index].reshape(1, 40, 6)
    back = np.asarray(decode(encode(keys, books), books))[:, :40]
    np.testing.assert_array_equal(back, keys)


# ---- tables and sums -------------------------------------------------------------------------------------------------


def test_the_worked_check_of_the_integer_path():
    """Ranges of 3 and 1 share the scale 85; entries 2.0 and 1.5 become 255 and 85, whose sum is 3.5 exactly."""
    spread = np.linspace(0, 1, 16, dtype=np.float32)
    books = np.zeros((1, 2, 16, 2), np.float32)
    books[0, 0, :, 0], books[0, 1, :, 1] = -1 + 3 * spread, 0.5 + spread
    q = np.array([[[1.0, 5.0, 7.0, 1.0]]], np.float32)
    found = query_table(q, books)
    assert (float(found.scale[0, 0]), float(found.bias[0, 0])) == (85.0, -0.5)
    assert (int(found.table[0, 0, 0, 15]), int(found.table[0, 0, 1, 15])) == (255, 85)
    index = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(1, 256, 2)
    codes = to_blocks(jnp.asarray(index))
    assert int(lookup_sums(found.table, codes)[0, 0, 255]) == 340
    logits = np.asarray(lookup_logits(found, codes))[0, 0]
    assert logits[255] == 3.5
    true = books[0, 0, index[0, :, 0], 0] + books[0, 1, index[0, :, 1], 1]
    assert np.abs(logits - true).max() <= 2 / (2 * 85) + 1e-6


@settings(max_examples=5)
@given(subs=st.sampled_from([1, 7, 32]), group=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_logits_are_within_half_a_step_of_every_run(subs, group, seed):
    books, q = normal(2, subs, 16, 2, seed=seed), 3 * normal(2, group, 2 * subs, seed=seed)
    tables = query_table(q, books)
    codes = np.random.default_rng(seed).integers(0, 256, (2, 2, subs, 16), np.uint8)
    sums, table = np.asarray(lookup_sums(tables.table, codes)), np.asarray(tables.table)
    assert table.max(axis=(-2, -1)).tolist() == [[255] * group] * 2 and not table.min(axis=-1).any()
    for head, g, slot in np.ndindex(2, group, 64):
        by_hand = sum(int(table[head, g, s, nibble(codes[head], slot, s)]) for s in range(subs))
        assert sums[head, g, slot] == by_hand
    exact = np.einsum("hgd,hsd->hgs", q.astype(np.float64), np.asarray(decode(codes, books), np.float64))
    step = 1 / np.asarray(tables.scale)[..., None]
    assert (np.abs(np.asarray(lookup_logits(tables, codes)) - exact) <= subs / 2 * step + 1e-4).all()


def test_the_largest_sum_fits():
    table = jnp.full((1, 1, 257, 16), 255, jnp.uint8)
    tables = QueryTable(table=table, scale=jnp.ones((1, 1)), bias=jnp.zeros((1, 1)))
    codes = jnp.zeros((1, 1, 257, 16), jnp.uint8)
    assert set(np.asarray(lookup_sums(table, codes)).ravel()) == {65_535}
    assert set(np.asarray(lookup_logits(tables, codes)).ravel()) == {65_535.0}


def test_a_query_of_zeros_looks_up_zeros():
    tables = query_table(jnp.zeros((1, 1, 4)), normal(1, 2, 16, 2))
    assert not np.asarray(tables.table).any() and float(tables.scale[0, 0]) == 1.0 and float(tables.bias[0, 0]) == 0.0


# ---- attention -------------------------------------------------------------------------------------------------------


def case(*, d_sub, batch=2, heads=2, group=3, head_dim=12, slots=70, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "books": normal(heads, head_dim // d_sub, 16, d_sub, seed=seed),
        "k": normal(batch, heads, slots, head_dim, seed=seed),
        "v": normal(batch, heads, slots, width, seed=seed + 1),
        "q": normal(batch, heads, group, head_dim, seed=seed + 2),
        "lengths": rng.integers(1, slots + 1, (batch, heads)).astype(np.int32),
        "seen": rng.random((batch, heads, slots)) < 0.6,
    }


def by_hand(c, *, seen):
    """Attention to centres, and to the keys themselves from the last full block of 32 on; 8-bit tables by numpy."""
    batch, heads, group, head_dim = c["q"].shape
    books, slots = c["books"].astype(np.float64), c["v"].shape[2]
    subs, d_sub = books.shape[1], books.shape[3]
    y, received = np.zeros((*c["q"].shape[:3], c["v"].shape[3])), np.zeros((batch, heads, slots))
    for b, h, g in np.ndindex(batch, heads, group):
        length, q = c["lengths"][b, h], c["q"][b, h, g].astype(np.float64) / np.sqrt(head_dim)
        products = np.einsum("sd,scd->sc", q.reshape(subs, d_sub), books[h])
        low = products.min(1)
        scale = 255 / (products.max(1) - low).max()
        logits = np.full(slots, -np.inf)
        for slot in range(length):
            key = c["k"][b, h, slot].astype(np.float64)
            if slot >= length // 32 * 32:
                logits[slot] = q @ key
            else:
                code = np.square(key.reshape(subs, 1, d_sub) - books[h]).sum(-1).argmin(-1)
                entries = products[np.arange(subs), code]
                logits[slot] = np.round((entries - low) * scale).sum() / scale + low.sum()
        if seen:
            logits[~c["seen"][b, h]] = -np.inf
        if np.isfinite(logits).any():
            powers = np.exp(logits - logits.max())
            weights = powers / powers.sum()
            received[b, h] += weights
            y[b, h, g] = weights @ c["v"][b, h]
    return y, received


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(("d_sub", "seen"), [(1, True), (2, False), (4, True)])
def test_attention_is_that_of_plain_loops(d_sub, seen, implementation):
    c = case(d_sub=d_sub, seed=d_sub)
    c["lengths"][0] = [0, 64]
    keys = code_keys(c["k"], c["lengths"], c["books"])
    y, received = attention(
        jnp.asarray(c["q"]),
        keys,
        c["v"],
        c["lengths"],
        c["books"],
        seen=c["seen"] if seen else None,
        with_received=True,
        implementation=implementation,
    )
    expected = by_hand(c, seen=seen)
    # A product that falls between two steps may go to either.
    np.testing.assert_allclose(y, expected[0], atol=3e-3)
    np.testing.assert_allclose(received, expected[1], atol=3e-3)
    assert not np.asarray(y)[0, 0].any() and not np.asarray(received)[0, 0].any()


def test_key_by_key_as_all_at_once():
    c = case(d_sub=2, slots=80)
    ends = np.array([[80, 33], [64, 7]], np.int32)
    keys = code_keys(c["k"][:, :, :1], np.ones_like(ends), c["books"])
    room = init_keys(batch=2, slots=80, head_dim=12, books=c["books"])
    keys = NomadKeys(codes=room.codes.at[:, :, :1].set(keys.codes), recent=keys.recent)
    for t in range(1, 80):
        at = np.where(t < ends, t, 96)  # rows that have ended write nowhere
        keys = append_key(keys, c["k"][:, :, t], at, c["books"])
    whole = code_keys(c["k"], ends, c["books"])
    slot = np.arange(96)[None, None, :, None]
    filled = slot < ends[..., None, None]
    np.testing.assert_array_equal(
        np.where(filled, from_blocks(keys.codes), 0), np.where(filled, from_blocks(whole.codes), 0)
    )
    np.testing.assert_array_equal(
        np.where(filled, decoded_keys(keys, ends, c["books"]), 0),
        np.where(filled, decoded_keys(whole, ends, c["books"]), 0),
    )
    exact = np.asarray(decoded_keys(keys, ends, c["books"]))[0, 0, 64:80]
    np.testing.assert_array_equal(exact, c["k"][0, 0, 64:80])


def test_keys_that_eviction_leaves():
    """They decode as before; only what lies in the last block and was exact stays exact."""
    c = case(d_sub=4)
    lengths, kept = np.array([[70, 40], [64, 33]], np.int32), np.array([[40, 33], [33, 32]], np.int32)
    keys = code_keys(c["k"], lengths, c["books"])
    rng = np.random.default_rng(5)
    slots = np.zeros((2, 2, 48), np.int32)
    for row, head in np.ndindex(2, 2):
        chosen = rng.permutation(lengths[row, head])[: kept[row, head]]
        slots[row, head, : len(chosen)] = np.sort(chosen)
    before, after = (
        np.asarray(decoded_keys(keys, lengths, c["books"])),
        np.asarray(decoded_keys(take_keys(keys, slots, lengths, kept, c["books"]), kept, c["books"])),
    )
    centres = np.asarray(decode(keys.codes, c["books"]))
    for row, head in np.ndindex(2, 2):
        end, whole = kept[row, head], kept[row, head] // 32 * 32
        chosen = slots[row, head]
        np.testing.assert_array_equal(after[row, head, :whole], centres[row, head, chosen[:whole]])
        np.testing.assert_array_equal(after[row, head, whole:end], before[row, head, chosen[whole:end]])


def test_16_bit_queries_and_values():
    c = case(d_sub=2)
    keys = code_keys(c["k"], c["lengths"], c["books"])
    wide, _ = attention(c["q"], keys, c["v"], c["lengths"], c["books"])
    q, v = c["q"].astype(jnp.bfloat16), c["v"].astype(jnp.bfloat16)
    narrow, none = attention(q, keys, v, c["lengths"], c["books"])
    assert narrow.dtype == jnp.bfloat16 and none is None
    np.testing.assert_allclose(narrow.astype(np.float32), wide, atol=0.05)


def test_vmap_over_layers():
    cases = [case(d_sub=4, seed=seed) for seed in (1, 2)]
    c = {name: np.stack([one[name] for one in cases]) for name in cases[0]}

    def one(q, k, v, lengths, books):
        return attention(q, code_keys(k, lengths, books), v, lengths, books)[0]

    both = jax.jit(jax.vmap(one))(*(c[name] for name in ("q", "k", "v", "lengths", "books")))
    for i, x in enumerate(cases):
        alone = one(*(x[name] for name in ("q", "k", "v", "lengths", "books")))
        np.testing.assert_allclose(both[i], alone, atol=1e-5)


def test_other_platforms_get_plain_jax():
    tables = QueryTable(table=jnp.zeros((1, 1, 2, 16), jnp.uint8), scale=jnp.ones((1, 1)), bias=jnp.ones((1, 1)))
    traced = lookup_logits.trace(tables, jnp.zeros((1, 1, 2, 16), jnp.uint8))
    assert "Effjax" not in traced.lower(lowering_platforms=("tpu",)).as_text()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoMAD(d_sub=3), "d_sub must be 1, 2 or 4, found 3"),
        (lambda: NoMAD(iterations=-1), "iterations must be a whole number of at least 0"),
        (lambda: NoMAD(d_sub=4).learn(jnp.zeros((1, 5, 6))), r"d_sub=4 does not divide head_dim 6; choose .* \[1, 2\]"),
        (lambda: NoMAD().learn(jnp.zeros((1, 5, 300))), "300 sub-quantizers, and sums of 16 bits hold 257"),
        (lambda: NoMAD(fisher=True).learn(jnp.zeros((1, 5, 4))), "needs the gradients"),
        (
            lambda: nomad.encode(jnp.zeros((2, 5, 4)), jnp.zeros((1, 4, 16, 1))),
            r"need codebooks \[2, 4, 16, 1\], found",
        ),
        (
            lambda: nomad.lookup_sums(jnp.zeros((1, 1, 258, 16), jnp.uint8), jnp.zeros((1, 1, 258, 16), jnp.uint8)),
            "sums of 16 bits hold 257",
        ),
        (
            lambda: nomad.lookup_sums(jnp.zeros((1, 1, 3, 16), jnp.uint8), jnp.zeros((1, 1, 2, 16), jnp.uint8)),
            r"need tables \[1, 1, 2, 16\], found \[1, 1, 3, 16\]",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": np.ones((2, 1), np.int32)}, r"need lengths \[2, 2\], found \[2, 1\]"),
        ({"v": np.zeros((2, 2, 97, 5), np.float32), "seen": None}, "values have 97 slots, the coded keys 96"),
        ({"v": np.zeros((2, 2, 70, 5), np.int8), "seen": None}, "values are int8; cast them to one of float32"),
        ({"seen": np.ones((2, 2, 9), bool)}, r"need seen \[2, 2, 70\]"),
        ({"q": np.zeros((2, 12), np.float32)}, "one a row, found"),
        ({"books": np.zeros((2, 6, 8, 2), np.float32)}, r"need codebooks \[2, 6, 16, 2\]"),
    ],
)
def test_attention_names_what_does_not_fit(changed, message):
    c = case(d_sub=2)
    keys = code_keys(c["k"], c["lengths"], c["books"])
    c |= changed
    with pytest.raises(ConfigError, match=message):
        nomad_attention.nomad_attention(c["q"], keys, c["v"], c["lengths"], c["books"], seen=c.get("seen"))


def test_an_appended_key_must_fit():
    keys = init_keys(batch=1, slots=40, head_dim=4, books=jnp.zeros((2, 4, 16, 1)))
    with pytest.raises(ConfigError, match=r"takes one key a row and head.*found \[1, 2, 3\]"):
        nomad_attention.append_key(keys, jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((2, 4, 16, 1)))
