"""Merging two vision models and CLIP with experts, from the command line: every stage, exact resume, a mesh, errors."""

import json
import shutil
import sys

import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.io.checkpoint import load_checkpoint
from train.distill import main
from train.distill_cliptex import ClipTexConfig, average_precision, mean_iou, regressed
from train.distill_sam_clip import SamClipConfig

SMALL = ["--size", 16, "--width", 8, "--layers", 1, "--dim", 6, "--heldout", 10, "--steps", 3, "--save-every", 1]
SMALL += ["--batch", 8, "--warmup", 0, "--log-every", 100]
SAM_CLIP = ["--scenes", 40, "--singles", 20, "--replay", 0.2, "--replay-batch", 4, "--base-steps", 2, "--aux-steps", 2]
SAM_CLIP += ["--probe-steps", 2, "--eval-every", 2]
CLIPTEX = ["--scenes", 40, "--labelled", 20, "--expert-batch", 4, "--expert-steps", 2, "--clip-steps", 2]
CLIPTEX += ["--text-width", 8, "--probe-steps", 3]


def run(monkeypatch, name, out, *flags):
    own = SAM_CLIP if name == "sam_clip" else CLIPTEX
    flags = ["--experiment", name, "--out", out, *SMALL, *own, *flags]
    monkeypatch.setattr(sys, "argv", ["train.distill", *map(str, flags)])
    main()


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["sam_clip", "cliptex"])
def test_all_stages_and_resume_between_and_within_them(name, monkeypatch, tmp_path, capsys):
    run(monkeypatch, name, tmp_path / "whole", "--mesh", "data=2")
    printed = capsys.readouterr().out
    loaded = load_checkpoint(tmp_path / "whole" / "model")
    if name == "sam_clip":
        assert all(word in printed for word in ("mask_iou", "text_iou", "segmenter mask_iou", "classifier accuracy"))
        assert set(loaded.params) == {"encoder", "prompt", "mask_head", "text_head", "texts"}
        assert {"text", "mask", "mask_iou", "accuracy"} < set(records(tmp_path / "whole")[-1])
        stages, last = ("base", "aux", "probe"), "probe"
    else:
        assert all(word in printed for word in ("class_iou", "before class_iou", "edge_precision", "retrieval"))
        assert set(loaded.params) == {"image", "text", "log_scale"}  # no head
        assert {"contrastive", "classes", "depth", "normals"} < set(records(tmp_path / "whole")[-1])
        stages, last = ("experts/classes", "experts/normals", "clip"), "clip"
    # As kills leave it in the last stage and in the one before; what was trained is not trained again.
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    shutil.rmtree(tmp_path / "run" / last / "checkpoints" / "2")
    before = [(tmp_path / "run" / stage / "metrics.jsonl").read_bytes() for stage in stages]
    run(monkeypatch, name, tmp_path / "run", "--resume", "--mesh", "data=2")
    after = [(tmp_path / "run" / stage / "metrics.jsonl").read_bytes() for stage in stages]
    assert before[:-1] == after[:-1]
    a, b = (tmp_path / part / "model" / "model.safetensors" for part in ("whole", "run"))
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(SystemExit, match="was begun with batch=8, not 4: go on with the same"):
        run(monkeypatch, name, tmp_path / "run", "--resume", "--batch", 4)


def test_measures():
    rng = np.random.default_rng(0)
    found, true = rng.integers(0, 3, (2, 50))
    wanted = [((found == c) & (true == c)).sum() / ((found == c) | (true == c)).sum() for c in range(3)]
    assert mean_iou(found, true, 3) == pytest.approx(np.mean(wanted))
    scores, hits = rng.random(30), rng.random(30) < 0.4
    order = sorted(range(30), key=lambda i: -scores[i])
    precise = [sum(hits[order[: at + 1]]) / (at + 1) for at in range(30) if hits[order[at]]]
    assert average_precision(scores, hits) == pytest.approx(np.mean(precise))
    x, kernel = rng.normal(size=(200, 3)).astype(np.float32), np.array([[1.0, 2], [0, -1], [3, 0]])
    np.testing.assert_allclose(regressed(x, x @ kernel + 4, x[:5]), x[:5] @ kernel + 4, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SamClipConfig, {"replay": 0.0}, "replay=0.0, lam=10.0, old_rate=0.1: replay is from 0 to 1"),
        (SamClipConfig, {"clicks": 9}, "clicks=9: must be from 1 to 8"),
        (SamClipConfig, {"size": 22}, "images of 22 x 22 and patch=4"),
        (ClipTexConfig, {"labelled": 0}, "labelled=0: must be from 1 to scenes=8000"),
        (ClipTexConfig, {"experts": ("depth", "depth")}, "each at most once"),
    ],
)
def test_settings_that_cannot_work(config, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config(out=tmp_path, **changes)
