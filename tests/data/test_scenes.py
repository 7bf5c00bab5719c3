"""Scenes: masks, depth, normals and captions agree with each other, pixel by pixel; the same seed, the same scenes."""

import dataclasses

import numpy as np
import pytest

from effjax.data.scenes import COLOURS, LENGTH, SHAPES, WORDS, clicks, describe, edges, make_scenes
from effjax.errors import ConfigError


def test_everything_agrees():
    scenes = make_scenes(3, 60, size=24)
    for i in range(len(scenes)):
        seen = set(np.unique(scenes.instances[i])) - {0}
        count = int((scenes.shapes[i] >= 0).sum())
        assert seen <= set(range(1, count + 1)) and 1 <= count <= 3
        for number in seen:
            assert set(scenes.classes[i][scenes.instances[i] == number]) == {scenes.shapes[i][number - 1] + 1}
        assert (scenes.classes[i][scenes.instances[i] == 0] == 0).all()
        # Whatever is in front is nearer than the ground of its row.
        for row in range(24):
            ground, objects = (scenes.depth[i, row][scenes.instances[i, row] == 0], scenes.instances[i, row] > 0)
            assert len(ground) == 0 or not objects.any() or scenes.depth[i, row][objects].min() > ground.max()
    np.testing.assert_allclose(np.linalg.norm(scenes.normals, axis=-1), 1, rtol=1e-5)
    assert scenes.depth.min() >= 0 and scenes.depth.max() <= 1
    assert set(np.unique(scenes.classes)) == set(range(len(SHAPES) + 1))


def test_captions_tell_what_is_there():
    scenes = make_scenes(4, 80, size=24)
    lengths = set()
    for i in range(len(scenes)):
        words = describe(scenes.captions[i]).split()
        kinds = sorted(SHAPES.index(word) for word in words if word in SHAPES)
        assert kinds == sorted(shape for shape in scenes.shapes[i] if shape >= 0)
        assert sum(word in COLOURS for word in words) == len(kinds) and set(words) <= set(WORDS)
        lengths.add(len(words))
    assert max(lengths) == LENGTH and scenes.captions.shape == (80, LENGTH)
    # Two objects of different kinds: the caption says on which side of the second the first is.
    checked = 0
    pairs = make_scenes(5, 40, size=32, objects=(2, 2))
    for i in range(len(pairs)):
        words = describe(pairs.captions[i]).split()
        first, second = words[2], words[-1]
        centres = []
        for name in (first, second):
            ys, xs = np.nonzero(pairs.classes[i] == SHAPES.index(name) + 1)
            centres.append((xs.mean(), ys.mean()) if len(xs) > 15 else None)
        if first == second or None in centres:
            continue
        (ax, ay), (bx, by) = centres
        if abs(abs(bx - ax) - abs(by - ay)) < 3:  # partly hidden, the middle of what is seen is another
            continue
        side = ("left" if bx > ax else "right") if abs(bx - ax) > abs(by - ay) else ("above" if by > ay else "below")
        assert side in words
        checked += 1
    assert checked > 15


def test_same_seed_same_scenes():
    a, b, other = (make_scenes(seed, 3, size=16) for seed in (7, 7, 8))
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    assert (a.images != other.images).any() and len(a[1:]) == 2


def test_clicks_lie_on_what_they_mask():
    scenes = make_scenes(1, 30, size=20)
    points, masks = clicks(scenes, np.random.default_rng(0), 3)
    assert points.shape == (30, 3, 2) and masks.shape == (30, 3, 20, 20)
    for i in range(30):
        for (row, column), mask in zip(points[i], masks[i], strict=True):
            number = scenes.instances[i, row, column]
            assert number > 0
            np.testing.assert_array_equal(mask, scenes.instances[i] == number)


def test_edges_are_where_neighbours_differ():
    instances = make_scenes(2, 4, size=16).instances
    found = edges(instances)
    for i, row, column in np.ndindex(found.shape):
        own = instances[i, row, column]
        wanted = any(r < 16 and c < 16 and instances[i, r, c] != own for r, c in ((row + 1, column), (row, column + 1)))
        assert found[i, row, column] == wanted


@pytest.mark.parametrize("options", [{"n": 0}, {"size": 8}, {"objects": (2, 4)}, {"objects": (2, 1)}])
def test_what_cannot_be_drawn(options):
    with pytest.raises(ConfigError, match="give a scene, 12 pixels and from 1 to 3 objects"):
        make_scenes(0, **{"n": 2} | options)
