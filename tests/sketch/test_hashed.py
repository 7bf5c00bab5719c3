"""Hashed weights: the table is the least-squares fit, and it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.arrays.hashed import slots_and_signs
from effjax.sketch import Hashed


def design(array, n, out):
    """The matrix that maps a table to the entries of the weight, built entry by entry."""
    slot, sign = slots_and_signs(array.seed, jnp.arange(n), out, array.table.size, array.block)
    matrix = np.zeros((n * out, array.table.size))
    matrix[np.arange(n * out), np.asarray(slot).ravel()] = np.asarray(sign).ravel()
    return matrix


@pytest.mark.parametrize(("ratio", "block"), [(1, 1), (3, 1), (4, 4), (2.5, 3)])
def test_least_squares_fit(ratio, block):
    """No table gives a smaller error: checked against a solver that knows nothing of the hash."""
    w = jax.random.normal(jax.random.key(0), (12, 10))
    array = Hashed(ratio=ratio, block=block).compress(w, key=jax.random.key(1))
    assert array.table.size == -(-120 // ratio)
    matrix = design(array, 12, 10)
    best, *_ = np.linalg.lstsq(matrix, np.asarray(w).ravel(), rcond=None)
    used = np.abs(matrix).sum(0) > 0
    np.testing.assert_allclose(np.asarray(array.table)[used], best[used], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(array.table)[~used], 0)
    np.testing.assert_allclose(array.materialize(), (matrix @ best).reshape(12, 10), atol=1e-5)


def test_gradient_of_the_table():
    """Every slot gathers the signed gradients of the entries that read it; training lowers the error."""
    w = jax.random.normal(jax.random.key(0), (12, 10))
    params = ej.sketch_params({"kernel": w}, Hashed(ratio=4), key=jax.random.key(1))
    x, y = jax.random.normal(jax.random.key(2), (32, 12)), jax.random.normal(jax.random.key(3), (32, 10))
    table, frozen = ej.partition(params)

    def loss(table):
        return jnp.square(ej.lift(lambda p, x: x @ p["kernel"])(ej.combine(table, frozen), x) - y).mean()

    start, gradient = jax.jit(jax.value_and_grad(loss))(table)
    dense = jax.grad(lambda w: jnp.square(x @ w - y).mean())(params["kernel"].materialize())
    want = design(params["kernel"], 12, 10).T @ np.asarray(dense).ravel()
    np.testing.assert_allclose(gradient["kernel"].table, want, rtol=1e-4, atol=1e-6)
    step = jax.jit(lambda t: jax.tree.map(lambda p, g: p - 0.1 * g, t, jax.grad(loss)(t)))
    for _ in range(20):
        table = step(table)
    assert loss(table) < 0.9 * start


def test_layers_hash_differently():
    array = Hashed(ratio=2).compress(jnp.ones((3, 8, 8)), key=jax.random.key(0))
    assert array.seed.shape == (3,) and len(set(np.asarray(array.seed).tolist())) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [({"ratio": 0.5}, "ratio=0.5: at least 1 weight a slot"), ({"block": 0}, "block=0: at least 1")],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        Hashed(**options)
