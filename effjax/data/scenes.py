"""Synthetic scenes from a seed, to try vision models on: coloured shapes with masks, depth, normals and captions.

Round shapes are domes, the others plates that lean to a side; both are lit from the upper left. What is nearer is
larger and hides what is behind it.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from effjax.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "saltire")
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.8, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.9, 0.85, 0.2),
}
WORDS = ("", "a", "and", "above", "below", "left", "right", "of", *COLOURS, *SHAPES)
LENGTH = 12  # words of a caption
FLOOR = np.array([0.0, -0.6, 0.8], np.float32)  # the normal of the ground; x to the right, y down, z to the viewer
LIGHT = np.array([-0.45, -0.45, 0.77], np.float32)
_DOMES = ("circle", "diamond", "ring", "triangle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """Images and all that is known of them.

    Attributes:
        images: RGB, around 0, from -1 to 1.
        instances: number of the object at each pixel, from 1; 0 is the ground.
        classes: `1 + index into SHAPES` at each pixel; 0 is the ground.
        depth: from 0 (far) to 1 (near).
        normals: of length 1; x to the right, y down, z to the viewer.
        shapes: index into `SHAPES` of each object; -1 where there are fewer.
        captions: word numbers, filled up with 0.
    """

    images: Float[np.ndarray, "n size size 3"]
    instances: UInt8[np.ndarray, "n size size"]
    classes: UInt8[np.ndarray, "n size size"]
    depth: Float[np.ndarray, "n size size"]
    normals: Float[np.ndarray, "n size size 3"]
    shapes: Int[np.ndarray, "n objects"]
    captions: Int[np.ndarray, "n length"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | np.ndarray) -> "Scenes":
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)})


def make_scenes(seed: int, n: int, *, size: int = 32, objects: tuple[int, int] = (1, 3), noise: float = 0.05) -> Scenes:
    """Draws scenes; the same ones for the same arguments.

    Args:
        seed: of everything.
        n: how many.
        size: side of an image.
        objects: fewest and most in a scene.
        noise: deviation of what is added to every colour.

    Raises:
        ConfigError: no scenes, images below 12 pixels, or not 1 to 3 objects, of which a caption can tell.

    Example:
        >>> scenes = make_scenes(0, 4, size=16)
        >>> scenes.images.shape, sorted(set(np.unique(scenes.instances)) - {0}) <= [1, 2, 3]
        ((4, 16, 16, 3), True)
        >>> words = describe(make_scenes(0, 1, objects=(1, 1)).captions[0]).split()
        >>> words[0], words[1] in COLOURS, words[2] in SHAPES
        ('a', True, True)
    """
    low, high = objects
    if n < 1 or size < 12 or not 1 <= low <= high <= 3:
        raise ConfigError(f"n={n}, size={size}, objects={objects}: give a scene, 12 pixels and from 1 to 3 objects")
    rng = np.random.default_rng(seed)
    count = rng.integers(low, high + 1, n)
    present = np.arange(high) < count[:, None]
    shapes = np.where(present, rng.integers(0, len(SHAPES), (n, high)), -1)
    colours = rng.integers(0, len(COLOURS), (n, high))
    near = rng.uniform(0.2, 0.9, (n, high)).astype(np.float32)
    radius = size * (0.14 + 0.12 * near)
    centres = _apart(rng, radius, size)
    leaning = rng.normal(size=(n, high, 2)).astype(np.float32) * 0.35

    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    depth = np.broadcast_to(0.15 * y / size, (n, size, size)).copy()
    normals = np.broadcast_to(FLOOR / np.linalg.norm(FLOOR), (n, size, size, 3)).copy()
    albedo = np.broadcast_to(rng.uniform(0.3, 0.6, (n, 1, 1, 1)), (n, size, size, 3)).astype(np.float32)
    instances = np.zeros((n, size, size), np.uint8)
    palette = np.array(list(COLOURS.values()), np.float32)
    for i in range(high):
        u, v = ((axis - centres[:, i, at, None, None]) / radius[:, i, None, None] for at, axis in enumerate((x, y)))
        inside = _inside(shapes[:, i], u, v)
        own = near[:, i, None, None] + 0.1 * np.clip(1 - u**2 - v**2, 0, 1)
        drawn = inside & (own > depth)
        depth = np.where(drawn, own, depth)
        instances[drawn] = i + 1
        normals = np.where(drawn[..., None], _normals(shapes[:, i], u, v, leaning[:, i]), normals)
        albedo = np.where(drawn[..., None], palette[colours[:, i]][:, None, None], albedo)
    shade = np.clip(normals @ LIGHT, 0.25, 1)[..., None]
    images = 2 * albedo * shade - 1 + rng.normal(size=albedo.shape) * noise
    labels = np.concatenate([np.zeros((n, 1), np.int64), shapes + 1], 1)
    return Scenes(
        images=images.astype(np.float32),
        instances=instances,
        classes=np.take_along_axis(labels, instances.reshape(n, -1).astype(np.int64), 1)
        .reshape(instances.shape)
        .astype(np.uint8),
        depth=np.clip(depth, 0, 1).astype(np.float32),
        normals=normals.astype(np.float32),
        shapes=shapes.astype(np.int32),
        captions=_captions(rng, shapes, colours, centres),
    )


def describe(caption: Int[np.ndarray, "length"]) -> str:
    """The words of a caption."""
    return " ".join(WORDS[word] for word in caption if word)


def clicks(
    scenes: Scenes, rng: np.random.Generator, count: int = 1
) -> tuple[Int[np.ndarray, "n count 2"], Bool[np.ndarray, "n count size size"]]:
    """Points on objects, evenly over the objects that are seen, and the masks of what was clicked.

    Args:
        scenes: to click at.
        rng: draws object and pixel.
        count: clicks a scene.

    Returns:
        Rows and columns of pixels, and masks.

    Example:
        >>> scenes = make_scenes(0, 5)
        >>> points, masks = clicks(scenes, np.random.default_rng(0), 2)
        >>> bool(all(masks[i, j][tuple(points[i, j])] for i in range(5) for j in range(2)))
        True
    """
    n, size = scenes.instances.shape[:2]
    flat = scenes.instances.reshape(n, 1, -1)
    numbers = 1 + np.arange(scenes.shapes.shape[1])
    seen = (flat == numbers[:, None]).any(-1)
    # The largest of random numbers among what is allowed: an even draw without a loop.
    chosen = 1 + np.argmax(np.where(seen[:, None], rng.random((n, count, len(numbers))), -1), -1)
    masks = flat == chosen[..., None]
    pixels = np.argmax(np.where(masks, rng.random((n, count, size * size)), -1), -1)
    return np.stack([pixels // size, pixels % size], -1).astype(np.int32), masks.reshape(n, count, size, size)


def edges(instances: UInt8[np.ndarray, "n size size"]) -> Bool[np.ndarray, "n size size"]:
    """Pixels whose right or lower neighbour belongs to another object.

    Example:
        >>> edges(np.array([[[0, 0, 1], [0, 0, 1], [0, 0, 0]]], np.uint8))[0].astype(int).tolist()
        [[0, 1, 0], [0, 1, 1], [0, 0, 0]]
    """
    found = np.zeros(instances.shape, bool)
    found[:, :, :-1] |= instances[:, :, 1:] != instances[:, :, :-1]
    found[:, :-1] |= instances[:, 1:] != instances[:, :-1]
    return found


def _apart(rng: np.random.Generator, radius: np.ndarray, size: int) -> np.ndarray:
    """Centres (x, y) inside the image: of several draws the one whose objects overlap least."""
    n, count = radius.shape
    drawn = rng.random((n, 16, count, 2)) * (size - 2 * radius[:, None, :, None]) + radius[:, None, :, None]
    distance = np.linalg.norm(drawn[:, :, :, None] - drawn[:, :, None], axis=-1)
    distance = distance / (radius[:, None, :, None] + radius[:, None, None])
    least = np.where(np.eye(count, dtype=bool), 1.2, distance).min((-1, -2))
    best = np.argmax(np.minimum(least, 0.9), 1)  # the first that is apart enough, so that all places occur
    return drawn[np.arange(n), best].astype(np.float32)


def _inside(shapes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which pixels a shape covers; `u` to the right and `v` down, from -1 to 1 within its radius."""
    au, av, r = abs(u), abs(v), np.hypot(u, v)
    covers = {
        "circle": r < 0.95,
        "square": np.maximum(au, av) < 0.8,
        "triangle": (v < 0.75) & (v > -1) & (au < 0.55 * (v + 1)),
        "diamond": au + av < 1,
        "cross": (np.minimum(au, av) < 0.3) & (np.maximum(au, av) < 0.95),
        "ring": (r < 1) & (r > 0.45),
        "bar": (au < 1) & (av < 0.42),
        "saltire": (abs(au - av) < 0.4) & (np.maximum(au, av) < 0.85),
    }
    which = shapes[:, None, None]
    return np.select([which == i for i in range(len(SHAPES))], [covers[name] for name in SHAPES], False)


def _normals(shapes: np.ndarray, u: np.ndarray, v: np.ndarray, leaning: np.ndarray) -> np.ndarray:
    domed = np.isin(shapes, [SHAPES.index(name) for name in _DOMES])[:, None, None, None]
    dome = 0.9 * np.clip(np.stack([u, v], -1), -1, 1)
    sides = np.where(domed, dome, leaning[:, None, None])
    whole = np.concatenate([sides, np.ones_like(sides[..., :1])], -1)
    return whole / np.linalg.norm(whole, axis=-1, keepdims=True)


def _captions(rng: np.random.Generator, shapes: np.ndarray, colours: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """One object alone; of two also where the first lies; of a third that it is there."""
    number = {word: i for i, word in enumerate(WORDS)}
    names, tints = [number[name] for name in SHAPES], [number[name] for name in COLOURS]
    captions = np.zeros((len(shapes), LENGTH), np.int32)
    for row, (kinds, hues, places) in enumerate(zip(shapes, colours, centres, strict=True)):
        order = rng.permutation(int((kinds >= 0).sum()))
        said = [[number["a"], tints[hues[i]], names[kinds[i]]] for i in order]
        words = said[0]
        if len(order) > 1:
            dx, dy = places[order[1]] - places[order[0]]
            where = ("left" if dx > 0 else "right") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
            words = words + [number[where]] + ([number["of"]] if abs(dx) > abs(dy) else []) + said[1]
        if len(order) > 2:
            words = words + [number["and"]] + said[2]
        captions[row, : len(words)] = words
    return captions
