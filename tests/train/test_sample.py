"""Samplers from the command line: every one trains, resumes to the same weights, scales keep few shapes, errors."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.io.checkpoint import load_checkpoint
from train.sample import SampleConfig, curve, main, read_records, shape_of
from train.sample_scores import like_target, scores
from train.sample_tasks import read_task

FLAGS = ["--steps", "4", "--batch", "8", "--warmup", "1", "--eval-every", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Bars in one of three places."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 80)
    pictures = rng.random((80, 8, 8)) * 0.3
    pictures[np.arange(80), 2 * labels + 1] += 2
    path = tmp_path_factory.mktemp("sample") / "images.npz"
    np.savez(path, images=pictures, labels=labels)
    return path


def sample(monkeypatch, out, *flags):
    words = [*map(str, flags), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.sample", *FLAGS, *words])
    main()


def weights(out, name):
    return load_checkpoint(out / "model" / name).params


def test_samplers_train_and_resume_to_the_same_weights(images, monkeypatch, tmp_path, capsys):
    flags = ("--data", images, "--samplers", "nws")
    sample(monkeypatch, tmp_path / "whole", *flags)
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 5000
    records = read_records(tmp_path / "whole" / "nws")
    assert [r["step"] for r in records] == [1, 2, 3, 4] and {r["count"] for r in records} == {8}
    points = curve(records, "accuracy")
    assert [p["examples"] for p in points] == [16, 32]
    assert 0 < points[0]["seconds"] < points[1]["seconds"] and 0 <= points[1]["accuracy"] <= 1
    assert "nws sampler_share_of_step" in capsys.readouterr().out
    sample(monkeypatch, tmp_path / "parts", *flags, "--stop-at", 2)
    assert "stopped at step 2 of 4 with nws; go on with --resume" in capsys.readouterr().out
    sample(monkeypatch, tmp_path / "parts", *flags, "--resume")
    chex.assert_trees_all_equal(weights(tmp_path / "whole", "nws"), weights(tmp_path / "parts", "nws"))
    with pytest.raises(SystemExit, match="error: .*nws already holds a run at step 4: pass resume"):
        sample(monkeypatch, tmp_path / "parts", *flags)


def test_the_others_train_too(images, monkeypatch, tmp_path):
    names = ("exact", "selective", "el2n")
    flags = ("--data", images, "--score-steps", 2, "--exact-every", 2, "--steps", 2)
    sample(monkeypatch, tmp_path, *flags, "--samplers", *names)
    for name in names:
        assert np.isfinite(weights(tmp_path, name)["head"]["kernel"]).all()


def test_a_scored_run_resumes_without_scoring_again(images, monkeypatch, tmp_path):
    flags = ("--data", images, "--score-steps", 2, "--samplers", "grand")
    sample(monkeypatch, tmp_path / "whole", *flags)
    sample(monkeypatch, tmp_path / "parts", *flags, "--stop-at", 2)
    monkeypatch.setattr("train.sample.scores", None)  # a call would fail
    sample(monkeypatch, tmp_path / "parts", *flags, "--resume")
    chex.assert_trees_all_equal(weights(tmp_path / "whole", "grand"), weights(tmp_path / "parts", "grand"))


def test_grand_is_the_length_of_each_gradient(images, tmp_path):
    config = SampleConfig(out=tmp_path, data=images, steps=2, warmup=1)
    task = read_task(config)
    params = task.init(jax.random.key(3))
    found = scores("grand", config, task, lambda: params)
    for i in (0, 7):
        example = jax.tree.map(lambda x, i=i: x[i : i + 1], task.examples)
        gradient = jax.grad(lambda p, example=example: task.losses(p, example)[0])(params)
        wanted = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
        np.testing.assert_allclose(found[i], wanted, rtol=1e-4)


def test_windows_like_a_target_are_kept(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("green stone by the river\nthe river and the stone\n")
    texts = ["import numpy as np", "a stone in the river", "def f(x): return x", "the green river", "x = y + 1"]
    assert like_target(texts, target, 0.4, seed=0).tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(ConfigError, match="--target .*none.txt: cannot be read as UTF-8 text"):
        like_target(texts, tmp_path / "none.txt", 0.4, seed=0)


def test_sizes_of_images_and_a_mesh(images, monkeypatch, tmp_path):
    """Two devices; the batches are those of the shapes."""
    flags = ("--data", images, "--scales", "msc_vbs", "--samplers", "uniform", "--mesh", "data=2", "--steps", 2)
    sample(monkeypatch, tmp_path, *flags)
    config = SampleConfig(out=tmp_path, data=images, scales="msc_vbs", batch=8, mesh="data=2", steps=2, warmup=1)
    task = read_task(config)
    shapes = [shape_of(config, task, step) for step in range(40)]
    assert {(s.height, s.batch) for s in shapes} == {(8, 8), (12, 2)}
    counts = [record["count"] for record in read_records(tmp_path / "uniform")]
    assert counts == [shape.batch for shape in shapes[:2]]


def test_text(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(rng.choice(["red", "green", "blue", "stone", "river", "cloud"], 3000)))
    flags = ("--dataset", "text", "--text", text, "--context", 8, "--samplers", "uniform", "--steps", 2)
    with pytest.raises(SystemExit, match="error: vocab=512: the text yields only [0-9]+ entries"):
        sample(monkeypatch, tmp_path / "out", *flags)
    text.write_text("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz    "), 9000)))
    sample(monkeypatch, tmp_path / "out", *flags)
    assert "heldout_loss" in (tmp_path / "out" / "uniform" / "metrics.jsonl").read_text()
    sample(monkeypatch, tmp_path / "like", *flags[:-3], "dsir", "--steps", 2, "--target", text, "--kept-share", 0.2)
    assert "heldout_loss" in (tmp_path / "like" / "dsir" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": None}, "--dataset images needs --data: an .npz file, or the directory of the images"),
        ({"kept_share": 0.0}, "kept_share=0.0: must be between 0 and 1"),
        ({"scales": "msc_vbs", "samplers": ("selective",)}, "--scales msc_vbs is for images, and not for selective"),
        ({"dataset": "text", "samplers": ("el2n",)}, "el2n and prototypes score images"),
        ({"samplers": ("dsir",)}, "write --dataset text --target FILE"),
        ({"accumulate": 2}, "samplers need the losses of a whole batch in float32"),
        ({"eval_every": 0}, "eval_every=0: the curves need at least 1"),
    ],
)
def test_settings_that_cannot_work(changes, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        SampleConfig(**{"out": tmp_path, "data": tmp_path} | changes)


def test_files_that_do_not_fit(images, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="error: --data .*nowhere.npz: cannot be read as images"):
        sample(monkeypatch, tmp_path / "out", "--data", tmp_path / "nowhere.npz")
    np.savez(tmp_path / "bad.npz", images=np.ones((5, 4)), labels=np.zeros(5, int))
    with pytest.raises(SystemExit, match=r"error: .*images \[5, 4\], labels \[5\]: give \[n, height, width\]"):
        sample(monkeypatch, tmp_path / "out", "--data", tmp_path / "bad.npz")
    with pytest.raises(SystemExit, match="error: batch=8: mesh 'data=3' has 3 devices; choose a multiple"):
        sample(monkeypatch, tmp_path / "out", "--data", images, "--mesh", "data=3")
