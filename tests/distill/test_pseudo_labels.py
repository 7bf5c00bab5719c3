"""The store of labels: what comes back against loops, going on after a kill, other labels, outputs that do not fit."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.distill import IGNORE, Expert, open_labels, write_labels
from effjax.errors import CheckpointError, ConfigError

IMAGES = np.random.default_rng(0).random((7, 8, 12, 3)).astype(np.float32)


def logits(images):
    return 9 * images[..., :3]


EXPERTS = {
    "things": Expert(kind="classes", apply=logits, least=0.5),
    "near": Expert(kind="depth", apply=lambda x: 5 - 3 * x[..., 0]),
    "side": Expert(kind="normals", apply=lambda x: x - 0.5),
}


def write(directory, experts=EXPERTS, images=IMAGES, **options):
    return write_labels(directory, experts, images, **{"teacher": "colours", "shard_rows": 3, "batch": 2} | options)


def test_what_comes_back(tmp_path):
    seen = []
    write(tmp_path / "labels", progress=lambda done, total: seen.append((done, total)))
    store = open_labels(tmp_path / "labels")
    assert seen == [(3, 7), (6, 7), (7, 7)] and store.grid == (2, 3)
    ids = np.array([6, 0, 0, 4])
    labels = store.rows(ids)
    assert {name: x.dtype for name, x in labels.items()} == {
        "things": np.int32,
        "near": np.float32,
        "side": np.float32,
    }
    ignored = 0
    for i, row, column in np.ndindex(4, 2, 3):
        image = IMAGES[ids[i]].astype(np.float64)
        square = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        middle = np.exp(9 * square[2, 2])
        certain = middle.max() / middle.sum() >= 0.5
        assert labels["things"][i, row, column] == (middle.argmax() if certain else IGNORE)
        ignored += not certain
        normal = (square - 0.5).mean((0, 1))
        np.testing.assert_allclose(labels["side"][i, row, column], normal / np.linalg.norm(normal), atol=1.5 / 127)
    assert 0 < ignored < 24
    for i in range(4):
        depth = (5 - 3 * IMAGES[ids[i], ..., 0].astype(np.float64)).reshape(2, 4, 3, 4).mean((1, 3))
        depth = (depth - depth.min()) / (depth.max() - depth.min())
        assert abs(labels["near"][i] - depth).max() <= 0.5 / 127 + 1e-6
    stored = store.shards[0]
    assert [stored[name].dtype for name in EXPERTS] == [np.uint8, np.int8, np.int8]


class Killed(BaseException):
    pass


def test_goes_on_after_a_kill_with_the_same_bytes(tmp_path):
    write(tmp_path / "whole")
    calls = []

    def dying(images):
        calls.append(len(images))
        if len(calls) == 3:  # in the middle of the second shard
            raise Killed
        return logits(images)

    with pytest.raises(Killed):
        write(tmp_path / "labels", EXPERTS | {"things": Expert(kind="classes", apply=dying, least=0.5)})
    with pytest.raises(CheckpointError, match="labels: shard-00001.safetensors is missing, 2 of 3 shards are"):
        open_labels(tmp_path / "labels")
    write(tmp_path / "labels")
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "labels").iterdir()) == names and len(names) == 4
    for name in names:
        assert (tmp_path / "labels" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_damage_and_other_labels_are_refused(tmp_path):
    store = write(tmp_path / "labels")
    store.check_images(IMAGES)
    with pytest.raises(CheckpointError, match="labels: has labels of 7 other images than these 6"):
        store.check_images(IMAGES[1:])
    for changes, what in (
        ({"teacher": "other"}, "teacher='colours', not 'other'"),
        ({"experts": {"near": EXPERTS["near"]}}, "kinds="),
        ({"images": IMAGES[::-1]}, "hashed="),
        ({"factor": 2}, "grid=[2, 3], not [4, 6]"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"labels: holds a store of {what}")):
            write(tmp_path / "labels", **changes)
    file = tmp_path / "labels" / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    for again in (open_labels, write):
        with pytest.raises(CheckpointError, match=r"labels/shard-00001.safetensors: is damaged \(its hash differs\)"):
            again(tmp_path / "labels")


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (Expert(kind="depth", apply=logits), r"shard-00000.safetensors: x gave \[2, 8, 12, 3\] .* are no depth"),
        (Expert(kind="normals", apply=lambda x: x[..., :2]), r"gave \[2, 8, 12, 2\] .* are no normals"),
        (Expert(kind="classes", apply=lambda x: x[:, ::2]), r"gave \[2, 4, 12, 3\] .* are no classes"),
        (Expert(kind="depth", apply=lambda x: x[..., 0] * jnp.nan), "x gave outputs that are not finite: nothing was"),
    ],
)
def test_outputs_that_do_not_fit(expert, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "labels", {"x": expert})
    assert not list((tmp_path / "labels").glob("*.safetensors"))


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="images of 8 x 12 and factor=5: choose a factor that divides"):
        write(tmp_path / "labels", factor=5)
    with pytest.raises(ConfigError, match="labels: give experts, images"):
        write(tmp_path / "labels", {})
    with pytest.raises(ConfigError, match="kind='edges': choose"):
        Expert(kind="edges", apply=logits)
    assert not (tmp_path / "labels").exists()
