"""NNX models on compressed parameters: through split and merge, through pure dictionaries, scanned and vmapped."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.lift.kinds import assert_lifts, compress


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.query = nnx.LinearGeneral(32, (2, 8), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=16, decode=False, rngs=rngs)

    def __call__(self, x):
        y = self.query(jax.nn.gelu(self.first(x)))
        return self.attention(y.reshape(*x.shape[:-1], 16))


PATHS = {"first/kernel", "query/kernel", *(f"attention/{n}/kernel" for n in ("query", "key", "value", "out"))}


def model_and_input():
    return Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 5, 16))


@pytest.mark.parametrize("kind", ["quantized", "low_rank"])
def test_split_and_merge(kind):
    model, x = model_and_input()
    graph, state = nnx.split(model)
    params = compress(state, kind, "*/kernel")
    assert_lifts(lambda s, x: nnx.merge(graph, s)(x), params, x, ops={(path, "dot_general") for path in PATHS})


def test_pure_dict():
    model, x = model_and_input()
    graph, state = nnx.split(model)
    pure = compress(nnx.to_pure_dict(state), "nf4", "*/kernel")

    def apply(pure, x):
        state = nnx.state(nnx.merge(graph, nnx.eval_shape(lambda: nnx.state(model))))
        nnx.replace_by_pure_dict(state, pure)
        return nnx.merge(graph, state)(x)

    assert_lifts(apply, pure, x, ops={(path, "dot_general") for path in PATHS})


def test_vmapped_construction_and_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return nnx.Linear(16, 16, rngs=rngs)

    layers = create(nnx.Rngs(0))
    graph, state = nnx.split(layers)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return jnp.tanh(layer(x))

    x = jax.random.normal(jax.random.key(1), (4, 16))
    params = compress(state, "quantized", "*/kernel")
    assert_lifts(lambda s, x: forward(nnx.merge(graph, s), x), params, x, ops={("kernel", "dot_general")})


def test_vmapped_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return nnx.Linear(16, 8, rngs=rngs)

    graph, state = nnx.split(create(nnx.Rngs(0)))
    forward = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=0)
    x = jax.random.normal(jax.random.key(1), (4, 16))
    params = compress(state, "nm_sparse", "*/kernel")
    assert_lifts(lambda s, x: forward(nnx.merge(graph, s), x), params, x, ops={("kernel", "dot_general")})
