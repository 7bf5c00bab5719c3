"""Distils a small recommender from a committee: a larger one of its kind, and one that reads what is known elsewhere.

Student and complementary teacher know users and items by their numbers (NeuMF, `effjax.models.ncf`). The foundation
teacher reads vectors that a decomposition of other users' likes gives of the items, and of a user their mean. All are
judged by HR@10 and NDCG@10 of an item that a user liked among 99 that it did not.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.movielens import read_liked
from benchmarks.movielens_distill import Ratings, draw_ratings, judge_scores, student_apply, upper, views
from effjax.distill import Batch, Committee, Teacher, apply_mlp, halves, init_mlp
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from effjax.models.ncf import apply_ncf, init_ncf, ncf_lower
from train.ask import AskConfig, Student, train_student, train_teacher
from train.command import same_settings
from train.finetune import PASSING
from train.processes import is_main

LO, HI = halves(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecommendConfig(AskConfig):
    """The likes and the networks.

    Attributes:
        experiment: "recommend".
        data: folder that holds train.txt, valid.txt and test.txt: a line is a user and the items it liked, numbers
            from 0. None draws 600 users, 300 items and their tastes from the seed.
        users, items: of whom and of which the student learns: users drawn, the commonest items.
        vector: numbers of an item, and of a user, that the foundation teacher reads.
        foundation: its hidden widths.
        complementary, student: features that NeuMF multiplies; its layers have as many, twice joined.
    """

    experiment: Literal["recommend"] = "recommend"
    data: Path | None = None
    users: int = 400
    items: int = 300
    vector: int = 32
    foundation: tuple[int, int] = (128, 64)
    complementary: int = 32
    student: int = 8
    batch: int = 256
    teacher_rate: float = 5e-3
    learning_rate: float = 1e-2
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.items < 110 or min(self.users, self.vector, self.complementary, self.student) < 1:
            raise ConfigError(f"items={self.items}, users={self.users}: give at least 110 items, and sizes above 0")


def drawn_likes(seed: int, users: int = 600, items: int = 300, rank: int = 4) -> dict[str, np.ndarray]:
    """Users with tastes, who liked 40 items each: 28 to train on, 4 to validate and 8 to test."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.normal(size=(users, rank)) @ rng.normal(size=(rank, items)) + rng.normal(size=items)
    order = rng.permuted(np.argsort(-(scores + rng.gumbel(size=scores.shape)), axis=1)[:, :40], axis=1)
    liked = {}
    for split, part in {"train": slice(0, 28), "valid": slice(28, 32), "test": slice(32, 40)}.items():
        liked[split] = np.zeros((users, items), bool)
        np.put_along_axis(liked[split], order[:, part], True, axis=1)
    return liked


def sizes(features: int) -> dict[str, Any]:
    """Of a NeuMF: vectors, and layers of which each halves the one before."""
    return {"gmf": features, "mlp": (2 * features, features, max(1, features // 2)), "scale": 0.3}


def widths(features: int) -> tuple[int, int]:
    """Of its middle and before its head."""
    gmf, (_, *layers) = features, sizes(features)["mlp"]
    return gmf + layers[0], gmf + layers[-1]


def read(config: RecommendConfig) -> Ratings:
    """Likes of some users, and what is known elsewhere.

    Raises:
        ConfigError: a file that cannot be read, or too little in it.
    """
    try:
        liked = drawn_likes(config.seed) if config.data is None else read_liked(config.data)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"--data {config.data}: cannot be read as users and the items they liked ({error})") from None
    return draw_ratings(liked, "test", config.seed, users=config.users, items=config.items, vector=config.vector)


def distill(config: RecommendConfig) -> dict[str, float] | None:
    """Trains teachers and student and writes `config.out / "model"`.

    Returns:
        HR@10 and NDCG@10 of the student, HR@10 of the teachers, and the share of passes through teachers that are kept;
        or None when the run was stopped before its last step.
    """
    ratings = read(config)
    same_settings(config, PASSING, data="drawn" if config.data is None else config.data.name)
    users, items = ratings.liked.shape
    pairs, liked = np.asarray(ratings.pairs), np.asarray(ratings.liked)
    everyone = jnp.arange(users)

    def likes(step: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of which half are liked, the others drawn evenly, and whether they are liked."""
        rng = np.random.default_rng((config.seed, step))
        ids = pairs[rng.integers(0, len(pairs), config.batch)]
        ids[::2, 1] = rng.integers(0, items, len(ids[::2]))
        return ids.astype(np.int32), liked[ids[:, 0], ids[:, 1]].astype(np.int32)

    def seen_at(step: int) -> tuple[Any, np.ndarray]:
        """What both teachers see, and labels."""
        ids, y = likes(step)
        return jax.tree.map(np.asarray, views(ratings, jnp.asarray(ids))), y

    lower, wide = (LO, ncf_lower), widths(config.complementary)
    inits = {
        "foundation": partial(init_mlp, widths=(3 * config.vector, *config.foundation, 2)),
        "complementary": lambda key: init_ncf(key, users, items, **sizes(config.complementary)),
    }
    applies = apply_mlp, lambda params, ids: upper(params, ncf_lower(params, ids))[1]
    shapes = {"split_dim": (config.foundation[0], wide[0]), "out_dim": (config.foundation[1], wide[1])}
    teachers = []
    for i, (name, init) in enumerate(inits.items()):

        def batch_at(step: int, i: int = i) -> Any:
            seen, y = seen_at(step)
            return seen[i], y

        params = train_teacher(config, name, init, applies[i], batch_at)
        if params is None:
            return None
        dims: dict[str, Any] = {field: pair[i] for field, pair in shapes.items()}
        teachers.append(Teacher(params=params, apply_lo=lower[i], apply_hi=(HI, upper)[i], **dims))
    committee = Committee(teachers=tuple(teachers))

    def observe(committee: Committee, batch: Any) -> Batch:
        seen, y = batch
        return Batch(x=seen[1], y=y, seen=committee.observe(seen))

    def judge(params: Any) -> dict[str, float]:
        hits, gains = judge_scores(partial(apply_ncf, params), everyone, ratings.judged)
        return {"hit_rate": float(hits), "ndcg": float(gains)}

    d1, d2 = widths(config.student)
    student = Student(
        init=lambda key: init_ncf(key, users, items, **sizes(config.student)), apply=student_apply, d1=d1, d2=d2
    )
    found = train_student(config, committee, student, seen_at, seen_at(0), judge, observe=observe)
    if found is None:
        return None
    params, figures = found
    for i, name in enumerate(inits):

        def scores(ids: jax.Array, i: int = i) -> jax.Array:
            logits = committee.observe(views(ratings, ids))[i].logits
            return logits[:, 1] - logits[:, 0]

        figures[name] = float(judge_scores(scores, everyone, ratings.judged)[0])
    described = {"model_type": "ncf", "users": users, "items": items, "features": config.student}
    card = (
        f"# A recommender that asked a committee\n\nHR@10 {figures['hit_rate']:.4f}, NDCG@10 {figures['ndcg']:.4f}, "
        f"{users} users, 99 negatives; HR@10 of the foundation teacher {figures['foundation']:.4f}, of the "
        f"complementary teacher {figures['complementary']:.4f}.\n"
    )
    if is_main():
        save_checkpoint(config.out / "model", params, config=described, card=card, overwrite=True)
    return figures
