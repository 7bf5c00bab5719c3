"""CLIPTeX: losses against loops, what is ignored, mirrored labels, tasks of weight zero, heads that are thrown away."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from effjax.distill import (
    IGNORE,
    balanced,
    class_loss,
    cliptex_losses,
    depth_loss,
    flip,
    init_heads,
    linear_task,
    normal_loss,
    strip_heads,
    symmetric_contrastive_loss,
    weighted_sum,
)
from effjax.errors import ConfigError
from effjax.models.clip import Clip, encode_image, encode_text, init_clip, scale
from effjax.models.vit import ViT

CLIP = Clip(image=ViT(size=(8, 8), width=8, layers=1, heads=2), vocab=9, length=4, width=8, layers=1, heads=2, dim=6)
KINDS = {"things": "classes", "near": "depth", "side": "normals"}
TASKS = tuple(linear_task(name, kind, 8, classes=5 if kind == "classes" else 0) for name, kind in KINDS.items())


def batch(seed=0, n=4):
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(n, 2, 2, 3)).astype(np.float32)
    labels = {
        "things": rng.integers(0, 5, (n, 2, 2)).astype(np.int32),
        "near": rng.random((n, 2, 2)).astype(np.float32),
        "side": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
    }
    return rng.normal(size=(n, 8, 8, 3)).astype(np.float32), rng.integers(1, 9, (n, 4)).astype(np.int32), labels


def test_class_loss_and_what_is_ignored():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 2, 2, 5)), rng.integers(0, 5, (3, 2, 2))
    labels[0, 0, 1] = labels[2] = IGNORE
    wanted = []
    for z, y in zip(logits, labels, strict=True):
        own = [np.log(np.exp(z[at]).sum()) - z[at][y[at]] for at in np.ndindex(2, 2) if y[at] != IGNORE]
        wanted.append(np.mean(own) if own else 0.0)
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    np.testing.assert_allclose(class_loss(logits, labels), wanted, rtol=1e-5)
    gradient = jax.grad(lambda z: class_loss(z, labels).sum())(logits)
    assert (gradient[0, 0, 1] == 0).all() and (gradient[2] == 0).all() and float(jnp.abs(gradient[1]).min()) > 0
    check_grads(lambda z: class_loss(z, labels), (logits,), order=1, modes=["rev"], rtol=0.05)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 20), st.floats(-30, 30))
def test_depth_loss_is_blind_to_scale_and_shift(seed, size, shift):
    found, labels = np.random.default_rng(seed).random((2, 2, 3, 5)).astype(np.float32)
    wanted = []
    for d, y in zip(found.astype(np.float64), labels.astype(np.float64), strict=True):
        d, y = ((x - np.median(x)) / np.abs(x - np.median(x)).mean() for x in (d, y))
        wanted.append(np.abs(d - y).mean())
    value = depth_loss(jnp.asarray(found), jnp.asarray(labels))
    np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        depth_loss(jnp.asarray(found), size * jnp.asarray(labels) + shift), value, rtol=1e-2, atol=1e-3
    )
    np.testing.assert_allclose(
        depth_loss(size * jnp.asarray(found) + shift, jnp.asarray(labels)), value, rtol=1e-2, atol=1e-3
    )


def test_normal_loss():
    rng = np.random.default_rng(0)
    found, labels = rng.normal(size=(2, 3, 2, 2, 3)).astype(np.float32)
    wanted = [
        np.mean([1 - a[at] @ b[at] / np.linalg.norm(a[at]) / np.linalg.norm(b[at]) for at in np.ndindex(2, 2)])
        for a, b in zip(found, labels, strict=True)
    ]
    found, labels = jnp.asarray(found), jnp.asarray(labels)
    np.testing.assert_allclose(normal_loss(found, labels), wanted, rtol=1e-5)
    check_grads(lambda x: normal_loss(x, labels), (found,), order=1, modes=["rev"], rtol=0.05)
    check_grads(lambda x: depth_loss(x, labels[..., 0]), (found[..., 0],), order=1, modes=["rev"], rtol=0.05)


def test_mirrored_labels_fit_mirrored_images():
    """A model that is right at every pixel is right on mirrored images, against mirrored labels."""
    images, _, _ = batch(n=5)

    def perfect(images):
        normals = np.stack([images[:, :, ::-1, 0] - images[..., 0], images[..., 1], 1 + 0 * images[..., 2]], -1)
        return {"things": (images[..., 1] > 0).astype(np.int32), "near": images[..., 2], "side": normals}

    which = np.array([True, False, True, True, False])
    before = images.copy()
    turned, labels = flip(images, perfect(images), KINDS, which)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(turned[which], images[which][:, :, ::-1])
    np.testing.assert_array_equal(turned[~which], images[~which])
    for name, found in perfect(turned).items():
        if name == "side":  # what points right at a pixel points left at its mirror image
            np.testing.assert_allclose(labels[name][..., 1:], found[..., 1:], atol=1e-6)
        else:
            np.testing.assert_array_equal(labels[name], found)
    side = perfect(images)["side"]
    np.testing.assert_allclose(labels["side"][which][..., 0], -side[which][:, :, ::-1, 0])
    again = flip(turned, labels, KINDS, which)
    np.testing.assert_array_equal(again[0], images)
    np.testing.assert_allclose(again[1]["side"], side)


def test_weight_zero_is_plain_training_bit_for_bit():
    clip = init_clip(jax.random.key(0), CLIP)
    params = init_heads(jax.random.key(1), clip, TASKS)
    off = tuple(linear_task(t.name, KINDS[t.name], 8, classes=5, weight=0.0) for t in TASKS)
    images, words, labels = batch()

    @jax.jit
    @jax.grad
    def with_tasks(params):
        return weighted_sum(cliptex_losses(CLIP, params, (images, words, labels), off), off)

    @jax.jit
    @jax.grad
    def plain(clip):
        u, v = encode_image(CLIP, clip, images)[0], encode_text(CLIP, clip, words)
        return symmetric_contrastive_loss(u, v, scale=scale(clip)).mean()

    found = with_tasks(params)
    jax.tree.map(np.testing.assert_array_equal, found["clip"], plain(clip))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found["heads"]))


def test_losses_add_up_and_reach_the_encoder():
    params = init_heads(jax.random.key(1), init_clip(jax.random.key(0), CLIP), TASKS)
    data = batch()
    losses = jax.jit(partial(cliptex_losses, CLIP, tasks=TASKS))(params, data)
    assert set(losses) == {"contrastive", *KINDS}
    told = balanced(TASKS, {name: float(x) for name, x in losses.items()})
    for task in told:
        np.testing.assert_allclose(task.weight * losses[task.name], losses["contrastive"], rtol=1e-5)
    np.testing.assert_allclose(weighted_sum(losses, told), 4 * losses["contrastive"], rtol=1e-5)
    for task in TASKS:
        gradient = jax.jit(jax.grad(lambda p, n=task.name: cliptex_losses(CLIP, p, data, TASKS)[n]))(params)
        assert float(jnp.abs(gradient["clip"]["image"]["vit"]["positions"]).max()) > 0
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["clip"]["text"]))
        assert all(
            bool((leaf != 0).any()) == (name == task.name)
            for name in KINDS
            for leaf in [gradient["heads"][name]["kernel"]]
        )
    assert strip_heads(params) is params["clip"] and "heads" not in strip_heads(params)


def test_a_permuted_batch_has_the_same_loss():
    params = init_heads(jax.random.key(1), init_clip(jax.random.key(0), CLIP), TASKS)
    images, words, labels = batch()
    order = np.array([2, 0, 3, 1])
    apply = jax.jit(partial(cliptex_losses, CLIP, tasks=TASKS))
    a = apply(params, (images, words, labels))
    b = apply(params, (images[order], words[order], {name: x[order] for name, x in labels.items()}))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


def test_what_does_not_fit():
    params = init_heads(jax.random.key(1), init_clip(jax.random.key(0), CLIP), TASKS)
    images, words, labels = batch()
    with pytest.raises(ConfigError, match=r"labels of 'near': \[4, 1, 2\] for patches \[4, 2, 2, 8\]: store labels"):
        cliptex_losses(CLIP, params, (images, words, labels | {"near": labels["near"][:, :1]}), TASKS)
    with pytest.raises(ConfigError, match="labels of 'things': nothing for patches"):
        cliptex_losses(CLIP, params, (images, words, {}), TASKS)
    with pytest.raises(ConfigError, match="near: weight=-1"):
        linear_task("near", "depth", 8, weight=-1)
    with pytest.raises(ConfigError, match="things: classes=0: say how many"):
        linear_task("things", "classes", 8)
