"""Masks against plain numpy: exact sparsity, ties, patterns and scopes; applying and packing them."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.errors import LeafError
from effjax.prune import Magnitude, Pattern, Random


def matrix(n=16, out=8, seed=0):
    return np.asarray(jax.random.normal(jax.random.key(seed), (n, out)))


def highest(scores, kept):
    """The indices of the `kept` highest, ties to the first, by Python's stable sort."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:kept]


masked = jax.jit(lambda method, w: method.mask(w), static_argnums=0)


@given(
    st.sampled_from([(4, 4), (7, 3), (5, 1)]),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.99]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@settings(max_examples=40)
def test_unstructured(shape, sparsity, seed, ties):
    """Exactly round(size * sparsity) weights go, the smallest; among equals the last."""
    rng = np.random.default_rng(seed)
    w = (rng.integers(-2, 3, shape) if ties else rng.standard_normal(shape)).astype(np.float32)
    mask = np.asarray(masked(Magnitude(sparsity=sparsity), w))
    assert (~mask).sum() == round(w.size * sparsity)
    want = np.zeros(w.size, bool)
    want[highest(np.abs(w).ravel().tolist(), w.size - round(w.size * sparsity))] = True
    np.testing.assert_array_equal(mask.ravel(), want)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "3:4", "4:8", "1:3", "2:5"])
def test_n_of_m(pattern):
    """In every group of m consecutive inputs of a column the n largest stay."""
    n, m = map(int, pattern.split(":"))
    w = matrix(n=8 * m)
    w = np.where(np.abs(w) < 0.3, 0.0, w)  # with ties
    mask = np.asarray(masked(Magnitude(pattern=pattern), w))
    for o in range(8):
        for start in range(0, 8 * m, m):
            want = np.zeros(m, bool)
            want[highest(np.abs(w[start : start + m, o]).tolist(), n)] = True
            np.testing.assert_array_equal(mask[start : start + m, o], want)


def test_blocks():
    """Blocks stay or go as a whole, by their mean score."""
    w = matrix()
    mask = np.asarray(masked(Magnitude(sparsity=0.5, pattern="4x2"), w))
    means = np.abs(w).reshape(4, 4, 4, 2).mean((1, 3)).ravel()
    want = np.zeros(16, bool)
    want[highest(means.tolist(), 8)] = True
    np.testing.assert_array_equal(mask, np.repeat(np.repeat(want.reshape(4, 4), 4, 0), 2, 1))


def test_leaf_and_global_scope():
    """Leaf scope takes the share of every matrix (and layer), global scope of all weights together."""
    params = {"large": {"kernel": 10 * jnp.asarray(matrix())}, "small": {"kernel": jnp.asarray(matrix(seed=1))}}
    local = ej.prune_mask(params, Magnitude(sparsity=0.5))
    assert [int(m.sum()) for m in jax.tree.leaves(local)] == [64, 64]
    together = ej.prune_mask(params, Magnitude(sparsity=0.5, scope="global"))
    scores = np.concatenate([np.abs(x).ravel() for x in jax.tree.leaves(params)])
    want = np.zeros(256, bool)
    want[highest(scores.tolist(), 128)] = True
    found = np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(together)])
    np.testing.assert_array_equal(found, want)
    assert int(together["large"]["kernel"].sum()) > 100
    stacked = ej.prune_mask({"kernel": jnp.stack(jax.tree.leaves(params))}, Magnitude(sparsity=0.5))["kernel"]
    assert stacked.sum((1, 2)).tolist() == [64, 64]


def test_rules_with_global_scope_compare_only_their_own_leaves():
    params = {"a1": {"kernel": jnp.full((4, 4), 3.0)}, "c1": {"kernel": jnp.ones((4, 4))}}
    rules = [("a1/*", Magnitude(sparsity=0.25, scope="global")), ("c1/*", Magnitude(sparsity=0.5, scope="global"))]
    mask = ej.prune_mask(params, rules)
    assert [int(m.sum()) for m in jax.tree.leaves(mask)] == [12, 8]


def test_attention_kernels_are_pruned_along_their_inputs():
    """`query` is [in, heads, dim], `out` is [heads, dim, out]: patterns run along what is contracted."""
    params = {
        "attention": {
            "query": {"kernel": jax.random.normal(jax.random.key(0), (8, 2, 3))},
            "out": {"kernel": jax.random.normal(jax.random.key(1), (2, 4, 5))},
        }
    }
    mask = ej.prune_mask(params, Magnitude(pattern="2:4"))["attention"]
    assert mask["query"]["kernel"].reshape(2, 4, 6).sum(1).tolist() == [[2] * 6] * 2
    assert mask["out"]["kernel"].reshape(2, 4, 5).sum(1).tolist() == [[2] * 5] * 2
    packed = ej.pack_mask(params, ej.prune_mask(params, Magnitude(pattern="2:4")))
    assert packed["attention"]["out"]["kernel"].shape == (2, 4, 5)


def test_random_ignores_the_weights():
    mask = ej.prune_mask({"kernel": jnp.zeros((16, 16))}, Random(sparsity=0.75), key=jax.random.key(0))["kernel"]
    assert int(mask.sum()) == 64
    assert 4 <= int(mask[:4].sum()) <= 28  # not all at the start, as ties of a magnitude would be


@pytest.mark.parametrize("pattern", [None, "2:4", "4x2"])
def test_apply(pattern):
    params = {"kernel": jnp.asarray(matrix()), "bias": jnp.ones(8)}
    method = Magnitude(sparsity=0.5, pattern=pattern)
    mask = ej.prune_mask(params, method)
    assert mask["bias"] is None
    applied = ej.apply_mask(params, mask)
    np.testing.assert_array_equal(applied["kernel"], np.where(mask["kernel"], params["kernel"], 0))
    assert applied["bias"] is params["bias"]
    assert applied["kernel"].dtype == params["kernel"].dtype


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("1:2", (1, 2)), ("2:4", (2, 4)), ("1:4", (1, 4)), ("4:8", (4, 8)), ("1:8", (1, 8)), ("1:3", (1, 3))],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pack(pattern, found, dtype):
    """The pattern of fewest bytes, which is the one that was asked for; bytes as counted by hand."""
    n, m = found
    params = {"kernel": jnp.asarray(matrix(n=48, out=16), dtype)}
    mask = ej.prune_mask(params, Magnitude(pattern=pattern))
    packed = ej.pack_mask(params, mask)["kernel"]
    assert (packed.n, packed.m) == found
    kept = 48 // m * n
    assert packed.nbytes == 16 * (kept * jnp.dtype(dtype).itemsize + -(-kept * (m - 1).bit_length() // 8))
    np.testing.assert_array_equal(packed.materialize(), ej.apply_mask(params, mask)["kernel"])


def fails(text, call, *args):
    with pytest.raises(LeafError) as found:
        call(*args)
    assert str(found.value) == text


def test_masks_that_cannot_be_packed():
    params = {"kernel": jnp.asarray(matrix())}
    none = {"kernel": jnp.ones((16, 8), bool)}
    text = (
        "kernel [16, 8]: the mask has no n:m pattern (m up to 16) that would save bytes; use apply_mask, or prune with "
        "pattern='2:4'"
    )
    fails(text, ej.pack_mask, params, none)
    fails("kernel: the mask is [8, 16], the weight [16, 8]", ej.apply_mask, params, {"kernel": none["kernel"].T})
    fails("kernel: the mask is [8, 16], the weight [16, 8]", ej.pack_mask, params, {"kernel": none["kernel"].T})
    fails(
        "the mask has 'other', the parameters do not: masks are trees like the parameters",
        ej.apply_mask,
        params,
        {"other": none["kernel"]},
    )
    packed = ej.pack_mask(params, ej.prune_mask(params, Magnitude(pattern="2:4")))
    fails(
        f"kernel is compressed already ({packed['kernel']}): prune before other transforms",
        ej.apply_mask,
        packed,
        none,
    )
    fails(
        "kernel: pack_mask looks at the mask to find its n:m pattern: call it outside of jit",
        jax.jit(ej.pack_mask),
        params,
        none,
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"sparsity=None: a share in \[0, 1\)"),
        ({"sparsity": 1.0}, r"sparsity=1.0: a share in \[0, 1\)"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "sparsity=0.4 contradicts pattern='2:4': leave it out"),
        (
            {"pattern": "2:4", "scope": "global"},
            "pattern='2:4' fixes the sparsity of every leaf: use scope='leaf'",
        ),
        ({"sparsity": 0.5, "scope": "all"}, "scope='all': choose 'output', 'leaf' or 'global'"),
        (
            {"pattern": "4:4"},
            "pattern='4:4': write 'n:m' with n < m <= 256, 'rowsxcolumns', or None for single weights",
        ),
        (
            {"sparsity": 0.5, "pattern": "0x4"},
            "pattern='0x4': write 'n:m' with n < m <= 256, 'rowsxcolumns', or None for single weights",
        ),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        Magnitude(**options)


def test_patterns_are_read_once():
    assert Pattern.parse("2:4") == Pattern(n=2, m=4) == Pattern.parse(Pattern(n=2, m=4))
    assert Pattern.parse("16x8").block == (16, 8)
    assert Pattern.parse(None) == Pattern()
