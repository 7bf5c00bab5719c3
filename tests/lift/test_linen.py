"""Linen models on compressed parameters: dense layers, scan, remat, attention, embeddings, convolutions, state."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import effjax as ej
from tests.lift.kinds import KINDS, assert_close, assert_lifts, compress, strict


class MLP(nn.Module):
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(32, dtype=self.dtype, param_dtype=self.param_dtype)(x))
        return nn.Dense(8, dtype=self.dtype, param_dtype=self.param_dtype)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(24, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.silu(h)), None


class Stack(nn.Module):
    layers: int
    remat: bool = True

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        return scanned(name="layers")(x, None)[0]


class Language(nn.Module):
    """Embedding, attention with causal mask, tied head."""

    vocab: int = 40
    width: int = 16

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocab, self.width, name="embed")
        x = embed(tokens)
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.RMSNorm()(x), mask=mask)
        return embed.attend(nn.RMSNorm()(x))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (4, 16))


@functools.cache
def make(model, shape, dtype, **kwargs):
    return jax.jit(functools.partial(model.init, **kwargs))(jax.random.key(0), jnp.zeros(shape, dtype))


def init(model, x, **kwargs):
    return make(model, x.shape, x.dtype, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_mlp(kind, x):
    params = compress(init(MLP(), x), kind)
    ops = {(f"params/Dense_{i}/kernel", "dot_general") for i in range(2)}
    assert_lifts(MLP().apply, params, x, ops=ops)


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_remat_block(kind, x):
    model = Stack(layers=3)
    params = compress(init(model, x), kind)
    ops = {(f"params/layers/{name}/kernel", "dot_general") for name in ("up", "down")}
    assert_lifts(model.apply, params, x, ops=ops)


@pytest.mark.parametrize("kind", ["quantized", "hashed"])
def test_scan_of_one_layer(kind, x):
    model = Stack(layers=1, remat=False)
    params = compress(init(model, x), kind)
    ops = {(f"params/layers/{name}/kernel", "dot_general") for name in ("up", "down")}
    assert_lifts(model.apply, params, x, ops=ops)


@pytest.mark.parametrize("kind", ["quantized", "low_rank", "hashed"])
def test_attention_kernels(kind):
    model = Language()
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 40)
    params = compress(init(model, tokens), kind)
    ops = {(f"params/attention/{n}/kernel", "dot_general") for n in ("query", "key", "value", "out")}
    assert_lifts(model.apply, params, tokens, ops=ops)


@pytest.mark.parametrize("kind", ["quantized", "nf4", "sum"])
def test_tied_embedding_is_looked_up_and_multiplied_compressed(kind):
    model = Language()
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 40)
    params = compress(init(model, tokens), kind, "*/embedding")
    ops = {("params/embed/embedding", "gather"), ("params/embed/embedding", "dot_general")}
    assert_lifts(model.apply, params, tokens, ops=ops)


def test_hashed_embedding_has_no_columns_and_says_so():
    model = Language()
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = compress(init(model, tokens), "hashed", "*/embedding")
    coverage = ej.lift(model.apply).coverage(params, tokens)
    assert {(use.op, use.kept) for use in coverage.uses} == {("gather", False), ("dot_general", True)}
    actual, expected = jax.jit(lambda p: (ej.lift(model.apply)(p, tokens), model.apply(ej.materialize(p), tokens)))(
        params
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["quantized"])
def test_convolution_is_made_dense_and_listed(kind):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (3, 3))(nn.Conv(8, (3, 3), name="first")(x)))
            return nn.Dense(4)(x.mean((1, 2)))

    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    params = compress(init(Net(), images), kind, lambda path, w: w.ndim > 1 and "first" not in path)
    assert_close(jax.jit(strict(Net().apply))(params, images), jax.jit(Net().apply)(ej.materialize(params), images))
    coverage = strict(Net().apply).coverage(params, images)
    (conv,) = coverage.materialized
    assert (conv.path, conv.op, conv.nbytes) == ("params/Conv_0/kernel", "conv_general_dilated", 3 * 3 * 8 * 16 * 4)
    assert ("params/Dense_0/kernel", True) in {(use.path, use.kept) for use in coverage.uses}


@pytest.mark.parametrize("kind", ["quantized", "nf4", "low_rank", "hashed"])
def test_bfloat16_parameters_and_computation(kind, x):
    model = MLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = compress(init(model, x), kind)
    assert params["params"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    out = assert_lifts(model.apply, params, x, tolerance=2e-2)
    assert out.dtype == jnp.bfloat16


def test_float32_parameters_computed_in_bfloat16(x):
    model = MLP(dtype=jnp.bfloat16)
    assert_lifts(model.apply, compress(init(model, x)), x, tolerance=2e-2)


def test_batch_norm_state_and_dropout_keys(x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x))
            return nn.Dense(8)(nn.Dropout(0.5, deterministic=not train)(x))

    variables = compress(init(Net(), x, train=False))

    def train(variables, x, key):
        return Net().apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    _, state = assert_lifts(train, variables, x, jax.random.key(3))
    assert set(state) == {"batch_stats"}


def test_vmapped_module_keeps_one_stack_of_experts(x):
    experts = nn.vmap(nn.Dense, in_axes=None, out_axes=0, axis_size=3, variable_axes={"params": 0},
                      split_rngs={"params": True})(8)  # fmt: skip
    assert_lifts(experts.apply, compress(init(experts, x)), x, ops={("params/kernel", "dot_general")})
