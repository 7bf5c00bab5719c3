"""Which leaves a method takes: patterns, predicates, the default choice, and the axes of a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import effjax as ej
from effjax.paths import leaves_with_paths, matches, path_str
from effjax.rules import assign, default_axes, is_dense_matrix

W = jnp.ones((4, 4))


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [
        ("*/kernel", "mlp/kernel", True),
        ("*/kernel", "a/b/c/kernel", True),
        ("*/kernel", "kernel", True),
        ("*/mlp/*/kernel", "layers_0/mlp/up_proj/kernel", True),
        ("*/mlp/*/kernel", "layers_0/attention/q_proj/kernel", False),
        ("kernel", "mlp/kernel", False),
        ("layers_?/*", "layers_3/x", True),
        ("layers_?/*", "layers_13/x", False),
        ("layers_[01]/*", "layers_1/x", True),
        ("*/Kernel", "mlp/kernel", False),
    ],
)
def test_patterns(pattern, path, found):
    assert matches(pattern, path, W) is found


def test_predicates_see_path_and_leaf():
    params = {"a": {"kernel": jnp.ones((4, 4))}, "c": {"kernel": jnp.ones((8, 4))}}
    assert assign(params, "m", lambda path, leaf: leaf.shape[0] == 8) == {"c/kernel": "m"}


@pytest.mark.parametrize(
    ("path", "shape", "taken"),
    [
        ("layers/mlp/up_proj/kernel", (2, 4, 4), True),
        ("kernel", (4, 4), True),
        ("experts/w1", (8, 4, 4), True),
        ("h_0/attn/c_attn/kernel", (4, 4), True),
        ("embed/embedding", (9, 4), False),
        ("wte/embedding", (9, 4), False),
        ("wpe", (9, 4), False),
        ("ln_1/scale", (2, 4), False),
        ("layers/attention_norm/scale", (2, 4), False),
        ("mlp/bias", (2, 4), False),
        ("lm_head/kernel", (4, 9), False),
        ("head/kernel", (4, 9), False),
        ("mlp/kernel", (4,), False),
    ],
)
def test_default_choice(path, shape, taken):
    assert is_dense_matrix(path, jnp.ones(shape)) is taken
    assert is_dense_matrix(path, jnp.ones(shape, jnp.int32)) is False


def test_a_layer_may_be_called_like_a_vector():
    assert is_dense_matrix("b/kernel", W) and is_dense_matrix("scale/w", W) and not is_dense_matrix("layer/b", W)


def test_first_match_wins_and_none_leaves_alone():
    params = {"a": {"kernel": W}, "c": {"kernel": W}, "d": {"kernel": W}}
    assert assign(params, [("a/*", None), ("c/*", 1), ("*/kernel", 2)]) == {"c/kernel": 1, "d/kernel": 2}


def test_the_default_leaves_out_what_is_compressed():
    """So a second transform takes the rest of the tree; a rule that names a compressed leaf is not silent."""
    half = ej.quantize_params({"a": {"kernel": W}, "c": {"kernel": W}}, [("a/*", ej.quantize.RTN(group_size=None))])
    assert assign(half, "m") == {"c/kernel": "m"}
    assert assign(half, [("*/kernel", "m")]) == {"a/kernel": "m", "c/kernel": "m"}
    both = ej.sketch_params(half, ej.sketch.LowRank(rank=1))
    assert both["a"]["kernel"] is half["a"]["kernel"] and isinstance(both["c"]["kernel"], ej.arrays.LowRank)


def test_axes_are_those_that_flax_contracts():
    """Against real attention layers: the reshaped product of `fold` equals the layer's einsum."""
    attention = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5, use_bias=False)
    params = attention.init(nnx.Rngs(0).params(), jnp.ones((1, 3, 4)))["params"]
    for name in ("query", "key", "value"):
        assert default_axes(f"layer/{name}/kernel", params[name]["kernel"].ndim) == ((-3,), (-2, -1))
    assert default_axes("layer/out/kernel", params["out"]["kernel"].ndim) == ((-3, -2), (-1,))
    assert default_axes("layer/out/kernel", 2) == ((-2,), (-1,))
    assert default_axes("embed/embedding", 2) == ((-1,), (-2,))
    quantized = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None))
    x = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
    want = jax.jit(attention.apply)({"params": ej.materialize(quantized)}, x)
    np.testing.assert_allclose(jax.jit(ej.lift(attention.apply))({"params": quantized}, x), want, atol=1e-5)


def test_linen_and_nnx_spell_alike():
    class Model(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(4, 8, rngs=nnx.Rngs(0))

    names = [path for path, _ in leaves_with_paths(nnx.state(Model()))]
    assert sorted(names) == ["up/bias", "up/kernel"]
    assert path_str(()) == ""
