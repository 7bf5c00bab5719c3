"""A recommender that asks a committee, from the command line: teachers, student, exact resume, too little data."""

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.movielens import read_liked, with_negatives
from benchmarks.movielens_distill import draw_ratings
from effjax.errors import ConfigError
from effjax.io.checkpoint import load_checkpoint
from effjax.models.ncf import apply_ncf
from train.distill import main
from train.distill_recommend import RecommendConfig, drawn_likes


@pytest.fixture(scope="module")
def likes(tmp_path_factory):
    """160 users and 120 items in files."""
    folder = tmp_path_factory.mktemp("likes")
    for split, liked in drawn_likes(3, users=160, items=150).items():
        lines = [" ".join(map(str, [user, *np.flatnonzero(row)])) for user, row in enumerate(liked)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(monkeypatch, likes, out, *flags):
    sizes = ["--users", 60, "--items", 150, "--vector", 4, "--foundation", 8, 6, "--complementary", 4, "--student", 2]
    steps = ["--steps", 4, "--teacher-steps", 3, "--skip-after", 2, "--save-every", 2, "--batch", 8]
    given = ["train.distill", "--experiment", "recommend", "--data", likes, "--out", out, *sizes, *steps, *flags]
    monkeypatch.setattr(sys, "argv", [str(flag) for flag in given])
    main()


def test_the_student_loads_and_resumed_is_uninterrupted(likes, monkeypatch, tmp_path, capsys):
    run(monkeypatch, likes, tmp_path / "whole")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("hit_rate", "ndcg", "kept", "foundation", "complementary"))
    loaded = load_checkpoint(tmp_path / "whole" / "model")
    assert set(loaded.params) == {"gmf", "mlp", "layers", "head"} and loaded.config["users"] == 60
    assert apply_ncf(loaded.params, jnp.array([[0, 3], [59, 149]])).shape == (2,)
    # As a kill after the third step leaves it; the teachers are not trained again.
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    run(monkeypatch, likes, tmp_path / "run", "--resume")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and "hit_rate" in records[-1]
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "run"))
    assert a.read_bytes() == b.read_bytes()


def test_what_is_judged_is_not_trained_on_and_is_unknown_elsewhere(likes):
    liked = read_liked(likes)
    assert not (liked["train"] & liked["test"]).any() and liked["train"].sum(1).tolist() == [28] * 160
    ratings = draw_ratings(liked, "test", 5, users=60, items=150, vector=4)
    train, judged = np.asarray(ratings.liked), np.asarray(ratings.judged)
    assert train.shape == (60, 150) and judged.shape == (60, 100)
    assert train[tuple(np.asarray(ratings.pairs).T)].all()
    for own, items in zip(train, judged, strict=True):
        assert len(set(items)) == 100 and not own[items].any()
    again = draw_ratings(liked, "test", 5, users=60, items=150, vector=4)
    np.testing.assert_array_equal(ratings.judged, again.judged)
    # What the foundation teacher reads of items does not depend on the users that are judged: it is of the others.
    common = np.argsort(-liked["train"].sum(0), kind="stable")[:150]
    rows = {row.tobytes(): user for user, row in enumerate(liked["train"][:, common])}
    who = [rows[row.tobytes()] for row in train]
    changed = {split: x.copy() for split, x in liked.items()}
    changed["test"][who] = np.roll(changed["test"][who], 1, axis=1) & ~changed["train"][who] & ~changed["valid"][who]
    found = draw_ratings(changed, "test", 5, users=60, items=150, vector=4)
    np.testing.assert_allclose(found.item, ratings.item, atol=1e-5)


def test_negatives_are_unknown_items():
    known = np.random.default_rng(0).random((7, 40)) < 0.3
    wanted = known & (np.cumsum(known, axis=1) == 1)
    rows = with_negatives(wanted, known, np.random.default_rng(1), count=9)
    for own, every, (first, *others) in zip(wanted, known, rows, strict=True):
        assert own[first] and len(set(others)) == 9 and not every[others].any()


def test_too_little_is_refused(likes, monkeypatch, tmp_path):
    with pytest.raises(
        SystemExit, match="error: 160 users, 160 with items in train, valid and test, 150 items: too few"
    ):
        run(monkeypatch, likes, tmp_path / "out", "--users", 158)
    with pytest.raises(SystemExit, match="error: --data nowhere: cannot be read as users and the items they liked"):
        run(monkeypatch, "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="items=100, users=400: give at least 110 items"):
        RecommendConfig(out=tmp_path, items=100)
    with pytest.raises(ConfigError, match="teacher_steps=0, batch=256: must be at least 1 and 2"):
        RecommendConfig(out=tmp_path, teacher_steps=0)
