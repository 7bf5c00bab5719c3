"""Refitted counts: those of least squares nearest to where they began, and never worse on what they are fitted to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.sketch import build_sketch, init_representer, query_sketch, refit_sketch

X = jax.random.normal(jax.random.key(0), (90, 7))
WANTED = jnp.stack([jnp.tanh(X[:, 0]), jnp.sin(2 * X[:, 1]) + 3, X[:, 2] * X[:, 3]], axis=1)
KERNEL = init_representer(jax.random.key(1), X, outputs=3, dim=3, points=20)
SKETCH = build_sketch(KERNEL, rows=5, buckets=4, key=jax.random.key(2))
refit = jax.jit(refit_sketch, static_argnames="steps")


def test_counts_are_the_nearest_of_least_squares():
    """Against a dense matrix of what every cell adds to every answer, by its pseudo-inverse."""
    codes = np.asarray(SKETCH.hash_functions()(X @ SKETCH.projection))
    n, rows = codes.shape
    reads = np.zeros((n, rows, 4))
    for i in range(n):
        for row in range(rows):
            reads[i, row, codes[i, row]] = 1 / (rows * (1 - 1 / 4))
    reads = reads.reshape(n, -1)
    rest = np.asarray(WANTED - query_sketch(SKETCH, X), np.float64)
    best = np.asarray(SKETCH.counts).reshape(-1, 3) + np.linalg.pinv(reads, rcond=1e-6) @ rest
    found = refit(SKETCH, X, WANTED, steps=60)
    np.testing.assert_allclose(found.counts.reshape(-1, 3), best, atol=2e-3)
    assert np.square(query_sketch(found, X) - WANTED).mean() < 0.5 * np.square(rest).mean()


def test_no_step_makes_an_output_worse():
    errors = np.stack(
        [np.square(query_sketch(refit(SKETCH, X, WANTED, steps=n), X) - WANTED).mean(0) for n in (0, 1, 2, 4)]
    )
    assert (np.diff(errors, axis=0) <= 1e-6).all()
    assert (errors[-1] < errors[0]).all()


def test_outputs_do_not_touch_each_other():
    together = refit(SKETCH, X, WANTED, steps=4)
    other = refit(SKETCH, X, WANTED.at[:, 1].set(0), steps=4)
    np.testing.assert_allclose(together.counts[..., ::2], other.counts[..., ::2], atol=1e-6)
    assert jnp.abs(together.counts[..., 1] - other.counts[..., 1]).max() > 0.1


def test_what_is_there_already_stays():
    answers = query_sketch(SKETCH, X)
    for steps, targets in ((0, WANTED), (4, answers)):
        found = refit(SKETCH, X, targets, steps=steps)
        np.testing.assert_allclose(found.counts, SKETCH.counts, atol=1e-5)
    exact = build_sketch(KERNEL, rows=1, buckets=2, key=jax.random.key(3))
    assert jnp.isfinite(refit(exact, X, WANTED, steps=30).counts).all()  # solved long before the last step


def test_more_inputs_than_are_hashed_at_once(monkeypatch):
    whole = refit_sketch(SKETCH, X, WANTED, steps=2)
    monkeypatch.setattr("effjax.sketch.representer_refit._ROWS_AT_ONCE", 16)
    np.testing.assert_allclose(refit_sketch(SKETCH, X, WANTED, steps=2).counts, whole.counts, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps=-1: 0 or more"),
        ({"x": X[:, :5]}, r"inputs of shape \(90, 5\): the sketch takes \(batch, 7\)"),
        ({"targets": WANTED[:, 0]}, r"targets of shape \(90,\): the sketch gives \(90, 3\) for them"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        refit_sketch(**({"sketch": SKETCH, "x": X, "targets": WANTED, "steps": 1} | changes))
