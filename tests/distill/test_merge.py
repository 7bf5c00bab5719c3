"""SAM-CLIP: losses against loops, one gradient of two passes, rates of modules, what is trained and what is not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from effjax.distill import (
    apply_text_head,
    cosine_loss,
    focal_dice_loss,
    in_turn,
    init_text_head,
    mask_loss,
    module_rates,
    text_head_loss,
    text_segment,
)
from effjax.errors import ConfigError
from effjax.models.promptable import init_promptable
from effjax.models.vit import ViT, apply_vit

VIT = ViT(size=(8, 8), width=8, layers=2, heads=2)


def merged(seed=0):
    base = init_promptable(jax.random.key(seed), VIT)
    return base | {"text_head": init_text_head(jax.random.key(seed + 1), base["encoder"], VIT, dim=5, layers=1)}


def batches(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
    masks = rng.random((2, 3, 8, 8)).astype(np.float32)
    points = rng.integers(0, 8, (2, 3, 2))
    return (images[:4], rng.normal(size=(4, 5)).astype(np.float32)), (images[4:], points, masks)


TEXT, MASK = partial(text_head_loss, VIT), partial(mask_loss, VIT)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_cosine_loss(seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32)
    wanted = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
    found = np.asarray(cosine_loss(jnp.asarray(x), jnp.asarray(y)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.min() >= -1e-6 and found.max() <= 2 + 1e-6
    np.testing.assert_allclose(cosine_loss(jnp.asarray(x), 3 * jnp.asarray(x)), 0, atol=1e-6)


def test_focal_dice_against_loops():
    rng = np.random.default_rng(0)
    z, scores = rng.random((2, 3, 4)), rng.normal(size=(2, 3, 4)) * 2
    wanted = []
    for mask, logits in zip(z, scores, strict=True):
        p = 1 / (1 + np.exp(-logits))
        focal = np.mean(
            [
                abs(p[at] - mask[at]) ** 2 * -(mask[at] * np.log(p[at]) + (1 - mask[at]) * np.log(1 - p[at]))
                for at in np.ndindex(3, 4)
            ]
        )
        wanted.append(20 * focal + 1 - (2 * (p * mask).sum() + 1) / ((p**2).sum() + (mask**2).sum() + 1))
    found = focal_dice_loss(jnp.asarray(z, jnp.float32), jnp.asarray(scores, jnp.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    loss = partial(focal_dice_loss, jnp.asarray(z, jnp.float32))
    check_grads(lambda s: loss(s).sum(), (jnp.asarray(scores, jnp.float32),), order=1, modes=["rev"], rtol=0.05)
    assert float(jnp.abs(jax.grad(lambda t: focal_dice_loss(t, jnp.asarray(scores)).sum())(jnp.asarray(z))).max()) == 0


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 2))
def test_soft_masks_are_best_met_exactly(seed, size):
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.05, 0.95, (1, 3, 3)).astype(np.float32)
    right = jnp.log(z / (1 - z))
    off = right + size * rng.normal(size=z.shape).astype(np.float32)
    assert float(focal_dice_loss(jnp.asarray(z), right)[0]) < 1e-5
    assert float(focal_dice_loss(jnp.asarray(z), off)[0]) > float(focal_dice_loss(jnp.asarray(z), right)[0])
    gradient = jax.grad(lambda s: focal_dice_loss(jnp.asarray(z), s).sum())(right)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_each_loss_leaves_the_others_head_alone():
    params, (aux, base) = merged(), batches()
    text, mask = jax.jit(jax.grad(TEXT))(params, aux), jax.jit(jax.grad(MASK))(params, base)
    assert all((leaf == 0).all() for name in ("mask_head", "prompt") for leaf in jax.tree.leaves(text[name]))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(mask["text_head"]))
    for gradient, name in ((text, "text_head"), (text, "encoder"), (mask, "mask_head"), (mask, "encoder")):
        assert optax.tree.norm(gradient[name]) > 1e-4


def test_two_passes_are_the_gradient_of_the_sum():
    params, both = merged(), batches()
    total = in_turn((TEXT, 1.0), (MASK, 10.0))
    (value, parts), found = jax.jit(jax.value_and_grad(total, has_aux=True))(params, both)
    wanted, gradient = jax.jit(jax.value_and_grad(lambda p: TEXT(p, both[0]) + 10 * MASK(p, both[1])))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(value, parts[0] + 10 * parts[1], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_in_turn_by_hand():
    total = in_turn((lambda p, x: (p["a"] * x).sum(), 2.0), (lambda p, x: (p["a"] ** 2 * p["b"] * x).sum(), 0.5))
    params, both = {"a": jnp.asarray(3.0), "b": jnp.asarray(5.0)}, (jnp.array([1.0, 2.0]), jnp.asarray(4.0))
    value, parts = total(params, both)
    assert float(value) == 2 * 9 + 0.5 * 180 and [float(part) for part in parts] == [9, 180]
    doubled = jax.grad(lambda p: 2 * total(p, both)[0])(params)
    assert float(doubled["a"]) == 2 * (2 * 3 + 0.5 * 120) and float(doubled["b"]) == 2 * 0.5 * 36
    # What is not trained has no gradient, whatever its type.
    ids = {"ids": jnp.arange(3)}
    loss = in_turn((lambda p, x: (p * x["ids"]).sum(), 1.0))
    assert float(jax.grad(lambda p: loss(p, [ids])[0])(2.0)) == 3


def test_rates_of_modules():
    rates = {"encoder": 0.1, "prompt": 0.0, "mask_head": 0.1, "text_head": 1.0}
    params = merged()
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)

    def moved(optimizer):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return updates

    plain = moved(optax.sgd(0.3))
    scaled = moved(optax.chain(optax.sgd(0.3), module_rates(rates)))
    for name, rate in rates.items():
        ratio = float(optax.tree.norm(scaled[name]) / optax.tree.norm(plain[name]))
        assert ratio == pytest.approx(rate, rel=1e-6)
    message = r"module_rates: of \['encoder'\], but the parameters are \['encoder', 'mask_head'"
    with pytest.raises(ConfigError, match=message):
        moved(module_rates({"encoder": 1.0}))


def train(params, loss, rates, steps=4):
    optimizer = optax.chain(optax.adam(1e-2), module_rates(rates))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def test_an_encoder_of_rate_zero_is_probing():
    params, (aux, base) = merged(), batches()
    total = in_turn((TEXT, 1.0), (MASK, 10.0))
    joint = train(
        params,
        lambda p: total(p, (aux, base))[0],
        {"encoder": 0.0, "prompt": 0.0, "mask_head": 0.1, "text_head": 1.0},
    )
    probed = train(params, lambda p: TEXT(p, aux, probe=True), dict.fromkeys(params, 0.0) | {"text_head": 1.0})
    for a, b in zip(jax.tree.leaves(joint["text_head"]), jax.tree.leaves(probed["text_head"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for tree, names in ((joint, ("encoder", "prompt")), (probed, ("encoder", "prompt", "mask_head"))):
        for name in names:
            for a, b in zip(jax.tree.leaves(tree[name]), jax.tree.leaves(params[name]), strict=True):
                np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(probed["text_head"]["up"]["kernel"] - params["text_head"]["up"]["kernel"]).max()) > 1e-3


def test_the_head_starts_as_the_last_block():
    params = merged()
    jax.tree.map(np.testing.assert_array_equal, params["text_head"]["block_0"], params["encoder"]["block_1"])


def test_masks_from_texts():
    """Patches that show a thing have the label that the maximum over them has, where they agree with it."""
    params, (images, _) = merged(), batches()[0]
    grid = apply_vit(VIT, params["encoder"], jnp.asarray(images))
    texts = jnp.eye(5)
    found = text_segment(VIT, params["encoder"], params["text_head"], jnp.asarray(images), 4 * texts)
    assert found.shape == (4, 8, 8, 5) and float(jnp.abs(found).max()) <= 1 + 1e-5
    patches = apply_text_head(VIT, params["text_head"], grid, pooling=None)
    np.testing.assert_allclose(found[:, ::7, ::7], patches, rtol=1e-4, atol=1e-5)  # corners are the patches' own
    # All patches alike: each is what the maximum is, so they name what the image is named.
    alike = jnp.broadcast_to(grid[:, :1, :1], grid.shape)
    each = apply_text_head(VIT, params["text_head"], alike, pooling=None)
    whole = apply_text_head(VIT, params["text_head"], alike, pooling="max")
    np.testing.assert_array_equal(
        (each @ texts).argmax(-1), jnp.broadcast_to((whole @ texts).argmax(-1)[:, None, None], (4, 2, 2))
    )
    larger = text_segment(VIT, params["encoder"], params["text_head"], jnp.ones((1, 12, 16, 3)), texts)
    assert larger.shape == (1, 12, 16, 5)
