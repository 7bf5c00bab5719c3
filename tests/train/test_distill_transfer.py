"""Task-oriented transfer from the command line: all phases, exact resume within each, and no labels but the few."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from effjax.errors import ConfigError
from effjax.io.checkpoint import load_checkpoint
from effjax.models.cnn import apply_cnn
from train.distill import main
from train.distill_transfer import TransferConfig
from train.images import pooled, read_labelled, shuffled_patches, textures, transfer_data, warped

PHASES = ("foundation", "adapted_head", "adapted_full", "transfer", "finetuned")


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """Images of eight classes, each a pattern and noise."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 24)
    patterns = rng.random((8, 6, 6)) > 0.5
    images = patterns[labels] + 0.1 * rng.random((len(labels), 6, 6))
    file = tmp_path_factory.mktemp("transfer") / "glyphs.npz"
    np.savez(file, images=images, labels=labels)
    return file


def run(monkeypatch, glyphs, out, *flags):
    sizes = ["--teacher", 6, 8, "--student", 4, 5, "--gallery", 120, "--n", 20, "--per-class", 5, "--batch", 8]
    steps = ["--pretrain-steps", 4, "--adapt-steps", 4, "--steps", 4, "--finetune-steps", 4, "--save-every", 2]
    given = ["train.distill", "--experiment", "transfer", "--data", glyphs, "--out", out, *sizes, *steps, *flags]
    monkeypatch.setattr(sys, "argv", [str(flag) for flag in given])
    main()


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(glyphs, tmp_path_factory):
    out = tmp_path_factory.mktemp("transfer") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, glyphs, out, "--mesh", "data=2")
    return out


def after_adapting(whole, out):
    """A run that has its adapted teacher, and not yet a student."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("model", "settings.json", "transfer", "finetuned"))
    return out


def test_the_student_loads_and_every_phase_is_recorded(whole):
    loaded = load_checkpoint(whole / "model")
    assert set(loaded.params) == {"conv_0", "conv_1", "head"} and loaded.config["widths"] == [4, 5]
    assert apply_cnn(loaded.params, jnp.ones((2, 6, 6, 1))).shape == (2, 4)
    for phase in PHASES:
        records = [json.loads(line) for line in (whole / phase / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3, 4], phase


def test_the_head_is_trained_before_the_rest(whole):
    def state(phase):
        return ocp.StandardCheckpointer().restore((whole / phase / "checkpoints" / "4" / "state").absolute())

    before, head, full = (state(phase)["params"] for phase in PHASES[:3])
    for name, same in {"conv_0": True, "conv_1": True, "head": False}.items():
        found, wanted = (np.asarray(params[name]["kernel"]) for params in (head, before["net"]))
        assert (found.shape == wanted.shape and (found == wanted).all()) == same, name
        assert (np.asarray(full[name]["kernel"]) != found).any()


@pytest.mark.parametrize("phase", ["adapted_full", "transfer", "finetuned"])
def test_resumed_in_any_phase_is_uninterrupted(whole, glyphs, monkeypatch, tmp_path, phase):
    # As a kill after the third step of the phase leaves it.
    out = tmp_path / "run"
    later = PHASES[PHASES.index(phase) + 1 :]
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("model", *later))
    shutil.rmtree(out / phase / "checkpoints" / "4")
    run(monkeypatch, glyphs, out, "--resume", "--mesh", "data=2")
    assert weights(out) == weights(whole)


def test_stopped_and_refused(whole, glyphs, monkeypatch, tmp_path, capsys):
    out = after_adapting(whole, tmp_path / "run")
    run(monkeypatch, glyphs, out, "--stop-at", "2", "--resume")
    assert "stopped in phase transfer at step 2 of 4; go on with --resume" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was begun with n=20, not 10: go on with the same"):
        run(monkeypatch, glyphs, out, "--n", "10", "--resume")


def test_no_label_but_the_few_is_used(whole, glyphs, monkeypatch, tmp_path):
    """What the gallery holds, and the labels of other classes, are known to the figures alone."""

    def shuffled(*args, **options):
        data = transfer_data(*args, **options)
        rng = np.random.default_rng(1)
        others = data.others[0], rng.permutation(data.others[1])
        return dataclasses.replace(data, in_domain=rng.permutation(data.in_domain), others=others)

    monkeypatch.setattr("train.distill_transfer.transfer_data", shuffled)
    out = after_adapting(whole, tmp_path / "run")
    run(monkeypatch, glyphs, out, "--mesh", "data=2", "--resume")
    assert weights(out) == weights(whole)


def test_without_a_transfer_set_the_student_is_finetuned_from_scratch(glyphs, monkeypatch, tmp_path, capsys):
    run(monkeypatch, glyphs, tmp_path, "--n", "0", "--adapt", "head")
    printed = capsys.readouterr().out
    assert "of_the_task" not in printed and not (tmp_path / "transfer").exists()
    assert not (tmp_path / "adapted_full").exists()


def test_task_agnostic_and_other_curations(glyphs, whole, monkeypatch, tmp_path, capsys):
    flags = {"agnostic": ("--no-oriented", "--curation", "random"), "domain": ("--curation", "in_domain")}
    for name, own in flags.items():
        run(monkeypatch, glyphs, after_adapting(whole, tmp_path / name), "--resume", *own)
    assert "of_the_task 1.0000" in capsys.readouterr().out
    assert len({weights(out) for out in (tmp_path / "agnostic", tmp_path / "domain", whole)}) == 3


def test_the_gallery_is_a_fifth_of_the_task_and_holds_nothing_that_is_judged(glyphs):
    images, labels = read_labelled(glyphs)
    data = transfer_data(images, labels, seed=3, per_class=5, gallery=120, test=30)
    assert len(data.gallery) == 120 and data.in_domain.sum() == 24
    assert len(data.labelled[1]) == 16 and sorted(data.heldout[1]) == [0, 1, 2, 3]
    inside = {x.tobytes() for x in data.gallery[data.in_domain]}
    for x, _ in (data.test, data.labelled, data.heldout):
        assert not inside & {image.tobytes() for image in x}
    assert not {x.tobytes() for x in data.gallery} & {x.tobytes() for x in data.test[0]}
    assert {x.tobytes() for x in data.others[0]} == {x.tobytes() for x in images[labels < 4]}
    again = transfer_data(images, labels, seed=3, per_class=5, gallery=120, test=30)
    np.testing.assert_array_equal(data.gallery, again.gallery)


def test_distractors_keep_their_pixels_or_their_range():
    rng = np.random.default_rng(0)
    images = rng.random((20, 6, 6, 1)).astype(np.float32)
    moved = shuffled_patches(images, rng)
    np.testing.assert_allclose(np.sort(moved.reshape(20, -1)), np.sort(images.reshape(20, -1)))
    assert (moved != images).reshape(20, -1).any(1).all()
    noise = textures(30, (6, 6, 1), rng)
    assert noise.shape == (30, 6, 6, 1) and noise.min() >= 0 and noise.max() <= 1


def test_views_are_of_the_image_and_differ():
    image = np.zeros((4, 9, 9, 2), np.float32)
    image[:, 3:6, 3:6] = 1
    views = np.asarray(warped(jax.random.key(7), image))
    assert views.shape == image.shape and views.min() >= 0 and views.max() <= 1 + 1e-6
    assert (views[:, 4, 4] > 0.9).all()  # its middle moves by a pixel at most
    assert len({view.tobytes() for view in views}) == 4
    np.testing.assert_allclose(views[..., 0], views[..., 1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"per_class": 4}, "192 images of 8 classes, per_class=4: give at least four classes, five labels"),
        ({"per_class": 20}, "192 images of 8 classes, per_class=20"),
    ],
)
def test_data_that_do_not_suffice(glyphs, options, text):
    images, labels = read_labelled(glyphs)
    with pytest.raises(ConfigError, match=text):
        transfer_data(images, labels, **({"seed": 0, "per_class": 5, "gallery": 120, "test": 30} | options))
    with pytest.raises(ConfigError, match=r"images \[192, 6, 6\], pool=4: give a pool that divides the sides"):
        pooled(images, 4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n": -1}, "n=-1, temperature=1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"adapt_steps": 0}, "adapt_steps=0"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        TransferConfig(out=tmp_path, **changes)
