"""Losses of task-oriented and task-agnostic transfer against NumPy, and early stopping as a state."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.distill import (
    adapt,
    agnostic_loss,
    apply_mlp,
    init_mlp,
    keep_best,
    label_loss,
    symmetric_contrastive_loss,
    transfer_loss,
)


def log_softmax(z, axis=-1):
    z = np.asarray(z, np.float64)
    z = z - z.max(axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis, keepdims=True))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear(params, x):
    return x @ params


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_transfer_loss_is_the_divergence(temperature):
    w, x, teacher = normal(0, 3, 4), normal(1, 5, 3), normal(2, 5, 4)
    found = transfer_loss(w, linear, x, teacher.astype(np.float16), temperature=temperature)
    p, q = log_softmax(teacher.astype(np.float16) / temperature), log_softmax(x @ w / temperature)
    np.testing.assert_allclose(found, temperature**2 * (np.exp(p) * (p - q)).sum(-1), rtol=2e-3, atol=1e-5)
    assert found.shape == (5,) and found.dtype == jnp.float32


def test_transfer_loss_is_zero_only_for_logits_equal_up_to_a_constant():
    x = normal(0, 6, 3)
    shifted = x + normal(1, 6, 1)
    np.testing.assert_allclose(transfer_loss(np.eye(3, dtype=np.float32), linear, x, shifted), 0, atol=1e-6)
    shifted[:, 0] += 0.5
    assert (transfer_loss(np.eye(3, dtype=np.float32), linear, x, shifted) > 1e-3).all()


def test_gradient_is_that_of_differences_and_none_flows_to_the_teacher():
    w, x, teacher, along = normal(0, 3, 4), normal(1, 5, 3), normal(2, 5, 4), normal(3, 3, 4)

    def loss(w, teacher):
        return transfer_loss(w, linear, x, teacher, temperature=2.0).sum()

    step = 1e-2
    wanted = (loss(w + step * along, teacher) - loss(w - step * along, teacher)) / (2 * step)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(w, teacher)
    np.testing.assert_allclose((gradients[0] * along).sum(), wanted, rtol=1e-2)
    assert not np.asarray(gradients[1]).any()


def test_segmentation_is_the_mean_over_pixels_of_the_teacher():
    x, teacher = normal(0, 2, 3, 3, 5), normal(1, 2, 6, 6, 5)
    found = transfer_loss(None, lambda params, x: x, x, teacher)
    own = jax.image.resize(x, (2, 6, 6, 5), "bilinear")
    p, q = log_softmax(teacher), log_softmax(own)
    np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(-1).mean((1, 2)), rtol=1e-4)


def contrast(a, b, temperature):
    """Rows of `a` find theirs in `b`, one after the other."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    return np.array([-log_softmax([row @ other / temperature for other in b])[i] for i, row in enumerate(a)])


def test_symmetric_contrast_is_both_directions():
    a, b = normal(0, 5, 3), normal(1, 5, 3)
    wanted = (contrast(a, b, 0.2) + contrast(b, a, 0.2)) / 2
    np.testing.assert_allclose(symmetric_contrastive_loss(a, b, scale=5.0), wanted, rtol=1e-4)
    gradients = jax.grad(lambda a, b, s: symmetric_contrastive_loss(a, b, scale=s).sum(), argnums=(0, 1, 2))(a, b, 5.0)
    assert all(float(optax.tree.norm(g)) > 1e-3 for g in gradients)
    with pytest.raises(ValueError, match=re.escape("image [5, 3] and text [5, 2]: give pairs of one width")):
        symmetric_contrastive_loss(a, b[:, :2])


def test_agnostic_loss_contrasts_projected_features():
    teacher, student = normal(0, 6, 5), normal(1, 6, 3)
    projection = {"kernel": normal(2, 3, 5), "bias": normal(3, 5)}
    own = student @ projection["kernel"] + projection["bias"]
    wanted = (contrast(own, teacher, 0.07) + contrast(teacher, own, 0.07)) / 2
    np.testing.assert_allclose(agnostic_loss(teacher, student, projection), wanted, rtol=1e-3)
    gradient = jax.grad(lambda t: agnostic_loss(t, student, projection).sum())(teacher)
    assert not np.asarray(gradient).any()
    flat = agnostic_loss(teacher, student, projection, temperature=1.0)
    maps = np.stack([teacher, teacher[::-1]], axis=1)[:, None], np.stack([student, student[::-1]], axis=1)[:, None]
    wanted = (flat + agnostic_loss(teacher[::-1], student[::-1], projection, temperature=1.0)) / 2
    np.testing.assert_allclose(agnostic_loss(*maps, projection, temperature=1.0), wanted, rtol=1e-4)
    with pytest.raises(ValueError, match=re.escape("teacher [6, 4] and projected student [6, 5]: make the projection")):
        agnostic_loss(teacher[:, :4], student, projection)


@pytest.fixture(scope="module")
def task():
    """Labels of a plane, few to train on and few held back."""
    x = normal(0, 40, 3)
    y = (x[:, 0] > 0).astype(np.int32)
    return init_mlp(jax.random.key(0), (3, 8, 2)), (x[:12], y[:12]), (x[12:], y[12:])


def test_the_best_on_the_way_is_kept(task):
    params, train, heldout = task
    plain = optax.sgd(3.0)  # jumps about
    optimizer = keep_best(plain, lambda params: label_loss(params, apply_mlp, heldout))
    gradient = jax.jit(jax.grad(lambda params: label_loss(params, apply_mlp, train)))
    state, seen = optimizer.init(params), []
    for _ in range(12):
        seen.append((float(label_loss(params, apply_mlp, heldout)), params))
        found = gradient(params)
        updates, state = optimizer.update(found, state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, plain.update(found, plain.init(params))[0])
        params = optax.apply_updates(params, updates)
    lowest, best = min(seen, key=lambda pair: pair[0])
    assert float(state.loss) == pytest.approx(lowest, rel=1e-5) and seen[-1][0] > lowest
    jax.tree.map(np.testing.assert_array_equal, state.params, best)
    wanted = -log_softmax(apply_mlp(best, heldout[0]))[np.arange(28), heldout[1]].mean()
    assert lowest == pytest.approx(wanted, rel=1e-5)


def test_adapt_learns_and_never_ends_below_its_start(task):
    params, train, heldout = task
    options = {"steps": 60, "batch": 8, "key": jax.random.key(1)}
    run = jax.jit(lambda params, rate: adapt(params, apply_mlp, train, heldout, optax.adam(rate), **options))
    before = float(label_loss(params, apply_mlp, heldout))
    assert float(label_loss(run(params, 3e-2), apply_mlp, heldout)) < 0.6 * before
    wild = run(params, 1e3)  # worse at every step
    jax.tree.map(np.testing.assert_array_equal, wild, params)
    jax.tree.map(np.testing.assert_array_equal, run(params, 3e-2), run(params, 3e-2))


def test_a_mask_adapts_the_head_alone_and_images_are_augmented(task):
    params, train, heldout = task
    frozen = optax.masked(optax.set_to_zero(), {"layer_0": True, "layer_1": False})
    options = {"steps": 5, "batch": 8, "key": jax.random.key(1)}

    def run(augment=None):
        return adapt(
            params, apply_mlp, train, heldout, optax.chain(optax.adam(1e-2), frozen), augment=augment, **options
        )

    head = run()
    jax.tree.map(np.testing.assert_array_equal, head["layer_0"], params["layer_0"])
    assert (head["layer_1"]["kernel"] != params["layer_1"]["kernel"]).any()
    moved = run(lambda key, x: x + jax.random.normal(key, x.shape))
    assert (head["layer_1"]["kernel"] != moved["layer_1"]["kernel"]).any()
