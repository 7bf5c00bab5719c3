"""The vision models against plain numpy: blocks, patches, position embeddings, both towers, clicks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from effjax.distill import symmetric_contrastive_loss
from effjax.errors import ConfigError
from effjax.models.clip import Clip, encode_image, encode_text, init_clip, scale
from effjax.models.promptable import apply_promptable, init_promptable
from effjax.models.transformer import apply_blocks, init_blocks
from effjax.models.vit import ViT, apply_vit, init_vit, pool, resize_positions

SMALL = ViT(size=(8, 12), width=8, layers=2, heads=2)
CLIP = Clip(image=SMALL, vocab=9, length=5, width=8, layers=1, heads=2, dim=6)


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def block(p, x, heads, seen):
    """One example at a time, one head at a time."""
    out = []
    for tokens, mask in zip(x, seen, strict=True):
        y = norm(p["norm_1"], tokens)
        q, k, v = (y @ p["attention"][f"{n}_proj"]["kernel"] + p["attention"][f"{n}_proj"]["bias"] for n in "qkv")
        parts = []
        for head in np.split(np.arange(x.shape[-1]), heads):
            logits = q[:, head] @ k[:, head].T / math.sqrt(len(head))
            weights = np.exp(logits - logits.max(-1, keepdims=True)) * mask
            parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, head])
        o, up, down = p["attention"]["o_proj"], p["mlp"]["up_proj"], p["mlp"]["down_proj"]
        tokens = tokens + np.concatenate(parts, -1) @ o["kernel"] + o["bias"]
        h = norm(p["norm_2"], tokens) @ up["kernel"] + up["bias"]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        out.append(tokens + h @ down["kernel"] + down["bias"])
    return np.stack(out)


def test_blocks():
    params = init_blocks(jax.random.key(0), 8, 2)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    x = np.asarray(jax.random.normal(jax.random.key(2), (3, 5, 8)))
    seen = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]], bool)
    wanted, own = x.astype(np.float64), jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for i in range(2):
        wanted = block(own[f"block_{i}"], wanted, 2, seen)
    np.testing.assert_allclose(apply_blocks(params, jnp.asarray(x), 2, jnp.asarray(seen)), wanted, rtol=2e-4, atol=2e-4)


def test_a_patch_is_a_token_at_its_place():
    """Without blocks each token is its own patch and position, in rows of the image."""
    params = init_vit(jax.random.key(0), SMALL)
    params = {name: params[name] for name in ("patches", "positions", "norm")}
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    grid = apply_vit(SMALL, params, jnp.asarray(images))
    for i, row, column in np.ndindex(2, 2, 3):
        patch = images[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
        token = patch @ params["patches"]["kernel"] + params["patches"]["bias"] + params["positions"][row, column]
        np.testing.assert_allclose(grid[i, row, column], norm(params["norm"], np.asarray(token)), rtol=1e-3, atol=1e-4)
    assert pool(grid, "max").shape == (2, 8)
    np.testing.assert_allclose(pool(grid, "mean"), np.asarray(grid).reshape(2, 6, 8).mean(1), rtol=1e-5, atol=1e-6)


def test_a_stem_sees_what_is_near():
    """Each token is made of the 7 x 7 pixels that two convolutions of stride 2 reach, and of no other."""
    config = ViT(size=(16, 16), width=8, layers=1, heads=2, stem=True)
    params = init_vit(jax.random.key(0), config)
    assert [params["stem"][f"conv_{i}"]["kernel"].shape for i in range(2)] == [(3, 3, 3, 4), (3, 3, 4, 8)]
    params = {name: params[name] for name in ("stem", "patches", "positions", "norm")}
    apply = jax.jit(lambda x: apply_vit(config, params, x))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
    changed = apply(images.at[0, 9, 5].set(7.0)) != apply(images)
    # Tokens r with 4 r <= pixel <= 4 r + 6, and the same for columns.
    wanted = np.zeros((4, 4), bool)
    wanted[1:3, 0:2] = True
    np.testing.assert_array_equal(np.asarray(changed[0]).any(-1), wanted)
    with pytest.raises(ConfigError, match="a stem needs a power of 2"):
        ViT(size=(18, 18), patch=6, width=12, heads=2, stem=True)


def test_positions_of_other_sizes():
    positions = jnp.broadcast_to(jnp.arange(4.0)[:, None, None], (4, 3, 2))
    assert resize_positions(positions, 4, 3) is positions
    larger = resize_positions(positions, 8, 6)
    assert larger.shape == (8, 6, 2)
    rows = np.asarray(larger[:, 0, 0])
    np.testing.assert_allclose(rows[1:-1], np.arange(1, 7) / 2 - 0.25, atol=1e-6)  # half a pixel apart, as images are
    np.testing.assert_allclose(resize_positions(jnp.full((2, 2, 1), 3.0), 5, 7), 3.0, rtol=1e-6)


def test_both_towers():
    params = init_clip(jax.random.key(0), CLIP)
    images = jax.random.normal(jax.random.key(1), (4, 8, 12, 3))
    words = jnp.array([[1, 2, 3, 0, 0], [3, 2, 1, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 1]])
    u, grid = encode_image(CLIP, params, images)
    v = encode_text(CLIP, params, words)
    assert grid.shape == (4, 2, 3, 8)
    for x in (u, v):
        assert x.dtype == jnp.float32 and x.shape == (4, 6)
        np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1, rtol=1e-5)
    moved = params["text"] | {"words": {"embedding": params["text"]["words"]["embedding"].at[0].set(9.0)}}
    again = encode_text(CLIP, params | {"text": moved}, words)  # what fills up is not looked at
    np.testing.assert_allclose(v, again, rtol=1e-6)
    assert float(scale(params | {"log_scale": jnp.asarray(7.0)})) == pytest.approx(100)
    assert float(jax.grad(lambda p: scale(p))(params | {"log_scale": jnp.asarray(7.0)})["log_scale"]) == 0


def test_symmetric_loss():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6, 5)).astype(np.float32)
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x.astype(np.float64), y.astype(np.float64)))
    logits = 7 * a @ b.T
    wanted = [np.log(np.exp(logits[i]).sum()) + np.log(np.exp(logits[:, i]).sum()) - 2 * logits[i, i] for i in range(6)]
    found = symmetric_contrastive_loss(jnp.asarray(x), jnp.asarray(y), scale=7.0)
    np.testing.assert_allclose(found, np.array(wanted) / 2, rtol=1e-4)
    order = rng.permutation(6)
    again = symmetric_contrastive_loss(jnp.asarray(x[order]), jnp.asarray(y[order]), scale=7.0)
    np.testing.assert_allclose(again, np.asarray(found)[order], rtol=1e-5)

    def mean(x, y, scale):
        return symmetric_contrastive_loss(x, y, scale=scale).mean()

    check_grads(mean, (jnp.asarray(x), jnp.asarray(y), 7.0), order=1, modes=["rev"], rtol=0.05)
    with pytest.raises(ValueError, match=r"image \[6, 5\] and text \[5, 5\]: give pairs"):
        symmetric_contrastive_loss(jnp.asarray(x), jnp.asarray(y[1:]))


def test_a_click_matters_where_it_is():
    params = init_promptable(jax.random.key(0), SMALL)
    images = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    points = jnp.array([[[0, 0], [7, 11]], [[3, 5], [3, 5]]])
    masks = apply_promptable(SMALL, params, images, points)
    assert masks.shape == (2, 2, 8, 12)
    np.testing.assert_array_equal(masks[1, 0], masks[1, 1])
    assert float(jnp.abs(masks[0, 0] - masks[0, 1]).max()) > 1e-3
    alone = apply_promptable(SMALL, params, images[:1], points[:1, 1:])
    np.testing.assert_allclose(alone[0, 0], masks[0, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViT(size=(30, 32)), "images of 30 x 32 and patch=4: resize to multiples"),
        (lambda: ViT(width=10, heads=4), "width=10 does not divide into heads=4"),
        (lambda: ViT(layers=0), "all sizes must be positive"),
        (lambda: Clip(width=10, heads=4), "heads divide the width"),
        (lambda: apply_vit(SMALL, init_vit(jax.random.key(0), SMALL), jnp.ones((1, 8, 12, 1))), "takes 3 channels"),
        (lambda: encode_text(CLIP, init_clip(jax.random.key(0), CLIP), jnp.ones((1, 4), int)), "with 0 to 5 words"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
