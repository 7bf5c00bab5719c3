"""Labelled images by name, and unlabelled galleries that mix the images of a task with others (for distillation)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.mnist import read_mnist
from effjax.errors import ConfigError

Part = tuple[np.ndarray, np.ndarray]  # images [n, height, width] and labels [n]


def read_labelled(data: Path | None) -> Part:
    """Grey images in [0, 1] and their labels.

    Args:
        data: .npz with `images [n, height, width]` and integer `labels [n]`; a directory that holds images/mnist; None
            for the digits of scikit-learn.

    Raises:
        ConfigError: a file that cannot be read, or does not hold images and labels that fit.
    """
    if data is None:
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-not-found]
        except ImportError:
            raise ConfigError(
                "the digits come with scikit-learn, which is missing: install it, or name --data"
            ) from None
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
    else:
        try:
            if data.is_dir():
                parts = [(x.reshape(-1, 28, 28), y) for x, y in read_mnist(data)]
                images, labels = (np.concatenate(both) for both in zip(*parts, strict=True))
            else:
                with np.load(data) as file:
                    images, labels = file["images"], file["labels"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--data {data}: cannot be read as images and labels ({error})") from None
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"images {list(images.shape)}, labels {list(labels.shape)}: give [n, height, width] and a label an image"
        )
    return (images / max(images.max(), 1e-9)).astype(np.float32), labels.astype(np.int32)


def pooled(images: np.ndarray, pool: int) -> np.ndarray:
    """Means of squares of `pool` by `pool` pixels, of images `[n, height, width]`.

    Raises:
        ConfigError: a pool that does not divide the sides.
    """
    n, height, width = images.shape
    if pool < 1 or height % pool or width % pool:
        raise ConfigError(f"images {list(images.shape)}, pool={pool}: give a pool that divides the sides")
    return images.reshape(n, height // pool, pool, width // pool, pool).mean((2, 4))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TransferData:
    """A task with few labels, a gallery without, and images of other classes with all of theirs.

    Attributes:
        others: images of the classes that are not the task's, and their labels.
        labelled: the task's; of labels from 0 on.
        heldout: a fifth of its labels, held back for early stopping.
        gallery: images `[n, height, width]`.
        in_domain: `bool[n]`, which of the gallery are of the task's classes; only to judge a choice.
        test: of the task, in neither.
    """

    others: Part
    labelled: Part
    heldout: Part
    gallery: np.ndarray
    in_domain: np.ndarray
    test: Part


def transfer_data(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    per_class: int,
    gallery: int,
    test: int,
    share: float = 0.2,
    natural: np.ndarray | None = None,
) -> TransferData:
    """Splits classes in two: the upper half is the task, the lower half other data.

    The rest of the gallery is, in equal parts: images of the lower classes, images of any class with patches shuffled,
    inverted ones, textures of noise, and `natural` where given. No image of the gallery is in the test.

    Args:
        images, labels: `[n, height, width]` or `[n, height, width, channels]` in [0, 1], and from 0 on.
        seed: of the split and of all that is drawn.
        per_class: labels of each of the task's classes; a fifth of them are held back.
        gallery: size of the gallery, or as far as there are images.
        test: images judged on, at most a third of the task's.
        share: of the task's images in the gallery.
        natural: photographs of the same size.

    Raises:
        ConfigError: too few images or classes.
    """
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    upper = np.arange(classes // 2, classes)
    own = rng.permutation(np.flatnonzero(labels >= upper[0]))
    other = rng.permutation(np.flatnonzero(labels < upper[0]))
    test = min(test, len(own) // 3)
    judged, rest = own[:test], own[test:]
    chosen = np.array([rest[labels[rest] == c][:per_class] for c in upper if (labels[rest] == c).sum() >= per_class])
    if classes < 4 or len(chosen) < len(upper) or per_class < 5 or test < 1:
        raise ConfigError(
            f"{len(images)} images of {classes} classes, per_class={per_class}: give at least four classes, five "
            "labels a class, and more images of each class than that"
        )
    held = max(1, per_class // 5)
    pool = np.setdiff1d(rest, chosen)
    inside = rng.permutation(pool)[: round(share * gallery)]
    outside = round(len(inside) * (1 / share - 1))
    kinds = 4 if natural is None else 5
    each = -(-outside // kinds)
    sources = np.concatenate([pool, other])
    drawn = [images[rng.choice(sources, each, replace=len(sources) < each)] for _ in range(2)]
    distractors = [
        images[rng.choice(other, each, replace=len(other) < each)],
        shuffled_patches(drawn[0], rng),
        1 - drawn[1],
        textures(each, images.shape[1:], rng),
    ]
    if natural is not None:
        distractors.append(natural[rng.choice(len(natural), each, replace=len(natural) < each)])
    mixed = np.concatenate([images[inside], np.concatenate(distractors)[rng.permutation(each * kinds)[:outside]]])
    order = rng.permutation(len(mixed))

    def part(ids: np.ndarray) -> Part:
        return images[ids], labels[ids] - upper[0]

    return TransferData(
        others=(images[other], labels[other]),
        labelled=part(chosen[:, held:].reshape(-1)),
        heldout=part(chosen[:, :held].reshape(-1)),
        gallery=mixed[order].astype(np.float32),
        in_domain=(np.arange(len(mixed)) < len(inside))[order],
        test=part(judged),
    )


def warped(key: jax.Array, images: jax.Array) -> jax.Array:
    """A view of each image: turned by up to 20 degrees, a quarter larger or smaller, sheared and moved; linear.

    Args:
        key: what is drawn from.
        images: `[n, height, width, channels]`.
    """
    height, width = images.shape[1:3]
    of_turn, of_scale, of_shear, of_move = jax.random.split(key, 4)
    n, middle = len(images), jnp.array([height - 1, width - 1]) / 2
    turn = jax.random.uniform(of_turn, (n,), minval=-jnp.pi / 9, maxval=jnp.pi / 9)
    scale = jax.random.uniform(of_scale, (n, 2), minval=0.75, maxval=1.25)
    shear = jax.random.uniform(of_shear, (n,), minval=-0.25, maxval=0.25)
    move = jax.random.uniform(of_move, (n, 2), minval=-0.11, maxval=0.11) * jnp.array([height, width])
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    rows = jnp.stack([scale[:, 0] * cos, shear - scale[:, 0] * sin], axis=-1)
    columns = jnp.stack([scale[:, 1] * sin, scale[:, 1] * cos], axis=-1)
    matrix = jnp.stack([rows, columns], axis=1)
    grid = jnp.stack(jnp.mgrid[:height, :width], axis=-1).reshape(-1, 2) - middle
    places = jnp.einsum("nij,pj->nip", matrix, grid) + (middle + move)[:, :, None]

    def one(image: jax.Array, place: jax.Array) -> jax.Array:
        at = place.reshape(2, height, width)
        return jax.vmap(lambda x: jax.scipy.ndimage.map_coordinates(x, [*at], order=1), -1, -1)(image)

    return jax.vmap(one)(images, places)


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by up to one pixel, around the edge."""
    found = np.empty_like(images)
    for i, move in enumerate(rng.integers(-1, 2, (len(images), 2))):
        found[i] = np.roll(images[i], move, (0, 1))
    return found


def shuffled_patches(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Quarters in another order: the strokes of an image without its shape."""
    h, w = images.shape[1] // 2, images.shape[2] // 2
    corners = [(i, j) for i in (0, h) for j in (0, w)]
    turns = np.array([[1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0], [1, 2, 3, 0]])[rng.integers(0, 4, len(images))]
    found = images.copy()
    for image, source, turn in zip(found, images, turns, strict=True):
        for (i, j), other in zip(corners, turn, strict=True):
            y, x = corners[other]
            image[i : i + h, j : j + w] = source[y : y + h, x : x + w]
    return found


def textures(n: int, shape: Any, rng: np.random.Generator) -> np.ndarray:
    """Noise in [0, 1], half of it smoothed over three pixels; `n` images of this shape."""
    noise = rng.random((n, *shape))
    smooth = sum(np.roll(noise, (i, j), (1, 2)) for i in range(-1, 2) for j in range(-1, 2)) / 9
    return np.where(rng.random((n, *(1,) * len(shape))) < 0.5, noise, (smooth - 0.5) * 2.5 + 0.5).clip(0, 1)
