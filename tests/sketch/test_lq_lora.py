"""LQ-LoRA and LoftQ against numpy: turns of rounding and singular values, Fisher weights, the start of fine-tuning."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays import Adapter, Sum
from effjax.errors import LeafError
from effjax.lift.calibrate import InputStats
from effjax.sketch import LqLora

compress = jax.jit(lambda method, w, stats=None: method.compress(w, stats=stats), static_argnums=0)


def truncated(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def turns(w, method, rows, columns):
    """The turns in float64, with the library's quantizer alone; returns the least weighted error."""
    quantize = jax.jit(lambda x: method.base.quantize(x).materialize())

    def error(rest):
        return np.square(rows[:, None] * rest * columns).sum()

    low, best = np.zeros(w.shape), error(w - np.asarray(quantize(jnp.asarray(w)), np.float64))
    for _ in range(method.iterations):
        base = np.asarray(quantize(jnp.asarray(w - low, jnp.float32)), np.float64)
        low = truncated(rows[:, None] * (w - base) * columns, method.rank) / rows[:, None] / columns
        best = min(best, error(w - base - low))
    return best


@given(st.sampled_from([("nf4", 4), ("uniform", 2)]), st.booleans(), st.integers(0, 20))
@settings(max_examples=4)
def test_oracle(grid, fisher, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((32, 24)).astype(np.float32)
    method = LqLora(grid=grid[0], bits=grid[1], group_size=16, rank=4, iterations=3, fisher=fisher)
    root = np.exp(rng.standard_normal((32, 1)) + rng.standard_normal((1, 24))).astype(np.float32)
    stats = InputStats(count=jnp.float32(1), fisher_sum=jnp.asarray(root**2), examples=jnp.float32(1))
    leaf = compress(method, w, stats if fisher else None)
    assert isinstance(leaf, Sum) and isinstance(leaf.parts[1], Adapter) and leaf.parts[1].rank == 4
    rows, columns = (root.mean(1) / root.mean(), root.mean(0) / root.mean()) if fisher else (np.ones(32), np.ones(24))
    rest = w - np.asarray(leaf.materialize(), np.float64)
    got = np.square(rows[:, None] * rest * columns).sum()
    assert got == pytest.approx(turns(w, method, rows, columns), rel=0.02)


def test_nearer_than_the_quantized_weight_and_than_one_turn():
    w = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    errors = [
        float(jnp.linalg.norm(compress(LqLora(bits=2, grid="uniform", rank=8, iterations=n), w).materialize() - w))
        for n in (0, 1, 5)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_the_adapter_trains_and_the_base_is_frozen():
    w = jax.random.normal(jax.random.key(0), (32, 16))
    params = ej.sketch_params({"kernel": w}, LqLora(rank=2, group_size=16))
    adapters, frozen = ej.partition_adapters(params)
    x = jax.random.normal(jax.random.key(1), (8, 32))
    apply = ej.lift(lambda p, x: x @ p["kernel"])
    grads = jax.jit(jax.grad(lambda a: (apply(ej.combine(a, frozen), x) ** 2).sum()))(adapters)
    dense = jax.grad(lambda w: ((x @ w) ** 2).sum())(params["kernel"].materialize())
    part = params["kernel"].parts[1]
    np.testing.assert_allclose(grads["kernel"].parts[1].a, dense @ part.b.T, rtol=1e-3, atol=1e-3)
    assert [x.shape for x in jax.tree.leaves(adapters)] == [(32, 2), (2, 16)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 3}, "bits=3: NF4 has 4; write grid='uniform' for other widths"),
        ({"rank": 0}, "rank=0, iterations=5: a rank of at least 1, and 0 or more turns"),
        ({"grid": "even"}, "grid='even': choose 'nf4' or 'uniform'"),
        ({"dtype": "int8"}, "dtype='int8' is no floating dtype"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        LqLora(**options)


def test_rank_above_the_full():
    with pytest.raises(LeafError, match=r"^kernel \[32, 8\]: rank=16 is above the full rank 8: choose a smaller rank"):
        ej.sketch_params({"kernel": jnp.ones((32, 8))}, LqLora(group_size=16))
