"""The small convolutional network against XLA's convolution, on sides even and odd."""

import jax
import numpy as np
import pytest

from effjax.models.cnn import apply_cnn, cnn_features, cnn_map, init_cnn


def convolved(params, x):
    for i in range(len(params) - 1):
        layer, numbers = params[f"conv_{i}"], ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + layer["bias"])
    return x


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 12, 3), (1, 5, 2)])
def test_patches_are_the_convolution(shape):
    params = init_cnn(jax.random.key(0), shape[-1], 4, (5, 6))
    params = jax.tree.map(lambda x: x + 0.1, params)
    x = jax.random.normal(jax.random.key(1), (3, *shape))
    np.testing.assert_allclose(cnn_map(params, x), convolved(params, x), rtol=1e-5, atol=1e-5)
    found, wanted = (jax.jit(jax.grad(lambda p, f=f: (f(p, x) ** 2).sum()))(params) for f in (cnn_map, convolved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_embedding_and_head():
    params = init_cnn(jax.random.key(0), 1, 4, (5, 6))
    x = jax.random.normal(jax.random.key(1), (3, 6, 6, 1))
    embedding = np.asarray(cnn_map(params, x)).mean((1, 2))
    np.testing.assert_allclose(cnn_features(params, x), embedding, rtol=1e-6)
    wanted = embedding @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(apply_cnn(params, x), wanted, rtol=1e-5, atol=1e-6)
