"""Recommenders for the claims of DiverseDistill: MovieLens-1M, judged by HR@10 and NDCG@10 among 99 negatives.

The student is NeuMF with 8 features, the complementary teacher NeuMF with 64. The foundation teacher knows no numbers
of users: it reads what a decomposition of the ratings of *other* users says of an item, and of a user the mean over the
items it liked, as a large model that was trained elsewhere would. (The data come without titles, so it reads no text.)
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import svds

from benchmarks.distill_arms import Arm, loss_of, plain_loss, train, with_module
from benchmarks.movielens import read_leave_one_out, read_liked, read_pretrained, with_negatives
from effjax.distill import Batch, Committee, Teacher, halves, init_mlp, strip
from effjax.errors import ConfigError
from effjax.evaluate import hit_rate_and_ndcg
from effjax.models.ncf import apply_ncf, init_ncf, ncf_lower, ncf_upper

USERS, ITEMS, PAIRS, VECTOR = 1500, 1000, 100_000, 64
STEPS, TEACHER_STEPS, BATCH = 1500, 2000, 512  # half of a batch is liked, half drawn
SMALL: dict[str, Any] = {"gmf": 8, "mlp": (16, 16, 8), "scale": 0.3}
BIG: dict[str, Any] = {"gmf": 64, "mlp": (128, 64, 32), "scale": 0.1}
FOUNDATION = (3 * VECTOR, 128, 64, 2)
D1, D2 = 24, 16  # widths of the student's middle, and before its head
LO, HI = halves(1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratings:
    """Who liked what, and what is known elsewhere.

    Attributes:
        pairs: `int[100000, 2]`, users and items to train on.
        liked: `bool[users, items]`, to train on.
        judged: `int[users, 100]`, for every user an item it liked, and then 99 that it did not.
        user, item: `float[users, 64]` and of items: what the foundation teacher reads.
    """

    pairs: jax.Array
    liked: jax.Array
    judged: jax.Array
    user: jax.Array
    item: jax.Array


def read_all(data: Path, split: str, seeds: tuple[int, ...]) -> Ratings:
    """A leading axis of seeds."""
    liked = read_liked(data / "recsys/ml-1m-implicit")
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(draw_ratings(liked, split, seed) for seed in seeds))


def draw_ratings(
    liked: dict[str, np.ndarray], split: str, seed: int, *, users: int = USERS, items: int = ITEMS, vector: int = VECTOR
) -> Ratings:
    """Some users, and the commonest items; the items judged are of `split`, "valid" or "test".

    Raises:
        ConfigError: too few users that have something in every split, users elsewhere, or items.
    """
    common = np.argsort(-liked["train"].sum(0), kind="stable")[:items]
    liked = {name: x[:, common] for name, x in liked.items()}
    rng = np.random.default_rng(seed)
    able = np.flatnonzero(np.all([x.any(1) for x in liked.values()], axis=0))
    every = np.any(list(liked.values()), axis=0)
    if len(able) < users or min(len(every) - users, items) <= vector or len(common) < items:
        raise ConfigError(
            f"{len(every)} users, {len(able)} with items in train, valid and test, {len(common)} items: too few for "
            f"users={users}, items={items}, vector={vector}; the foundation teacher reads what other users liked"
        )
    who = rng.choice(able, users, replace=False)
    judged = with_negatives(liked[split][who], every[who], rng)
    elsewhere = np.delete(every, who, axis=0).astype(np.float32)
    scaled = elsewhere / np.sqrt(1 + elsewhere.sum(1, keepdims=True)) / np.sqrt(1 + elsewhere.sum(0))
    item = svds(scaled, k=vector, v0=np.ones(min(scaled.shape)))[2].T * items**0.5
    own = liked["train"][who]
    user = own @ item / own.sum(1, keepdims=True)
    pairs = rng.permutation(np.argwhere(own))[:PAIRS]
    arrays = pairs, own, judged, (user / user.std()).astype(np.float32), item.astype(np.float32)
    return Ratings(*map(jnp.asarray, arrays))


def two_labels(score: jax.Array) -> jax.Array:
    """Logits of "does not like" and "likes"."""
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def upper(params: Any, middle: jax.Array) -> tuple[jax.Array, jax.Array]:
    features, score = ncf_upper(params, middle)
    return features, two_labels(score)


def student_apply(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    middle = ncf_lower(params, ids)
    return (middle, *upper(params, middle))


def views(ratings: Ratings, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What foundation and complementary teacher see of pairs."""
    user, item = ratings.user[ids[:, 0]], ratings.item[ids[:, 1]]
    return jnp.concatenate([user, item, user * item], axis=-1), ids


def draw_pairs(ratings: Ratings, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs `[batch, 2]` and whether the item was liked; others are drawn evenly."""
    of_pairs, of_items = jax.random.split(key)
    liked = ratings.pairs[jax.random.randint(of_pairs, (BATCH // 2,), 0, len(ratings.pairs))]
    others = jax.random.randint(of_items, (BATCH // 2,), 0, ratings.item.shape[0])
    ids = jnp.concatenate([liked, jnp.stack([liked[:, 0], others], axis=1)])
    return ids, ratings.liked[ids[:, 0], ids[:, 1]].astype(jnp.int32)


def judge_scores(scores_of: Any, users: jax.Array, judged: jax.Array) -> jax.Array:
    """HR@10 and NDCG@10 of `scores_of(pairs)`."""
    ids = jnp.stack([jnp.repeat(users, judged.shape[1]), judged.reshape(-1)], axis=1)
    found = hit_rate_and_ndcg(scores_of(ids).reshape(judged.shape))
    return jnp.stack([x.mean() for x in found])


@jax.jit
def train_committees(keys: jax.Array, ratings: Ratings) -> tuple[Committee, jax.Array]:
    """A committee for every seed, and HR@10 and NDCG@10 of its teachers."""

    def one(given: tuple[jax.Array, Ratings]) -> tuple[Committee, jax.Array]:
        key, ratings = given
        teachers = []
        for i, (lower, higher) in enumerate(((LO, HI), (ncf_lower, upper))):
            of_init, of_steps = jax.random.split(jax.random.fold_in(key, i))

            def draw(key: jax.Array, i: int = i) -> Any:
                ids, y = draw_pairs(ratings, key)
                return views(ratings, ids)[i], y

            start = init_ncf(of_init, USERS, ITEMS, **BIG) if i else init_mlp(of_init, FOUNDATION)
            loss = plain_loss(lambda params, x, lower=lower, higher=higher: higher(params, lower(params, x))[1])
            params, _ = train(loss, {"student": start}, draw, of_steps, (2e-3, 5e-3)[i], TEACHER_STEPS)
            sizes = {"split_dim": (FOUNDATION[1], 128)[i], "out_dim": (FOUNDATION[2], 96)[i]}
            teachers.append(Teacher(params=params["student"], apply_lo=lower, apply_hi=higher, **sizes))
        committee = Committee(teachers=tuple(teachers))

        def scores(i: int) -> jax.Array:
            def of(ids: jax.Array) -> jax.Array:
                logits = committee.observe(views(ratings, ids))[i].logits
                return logits[:, 1] - logits[:, 0]

            return judge_scores(of, jnp.arange(USERS), ratings.judged)

        return committee, jnp.stack([scores(0), scores(1)])

    return jax.lax.map(one, (keys, ratings))


@partial(jax.jit, static_argnames="arm")
def run(arm: Arm, options: dict[str, Any], keys: Any, committees: Committee, ratings: Ratings) -> Any:
    """HR@10 and NDCG@10 of the student for every seed, and the share of passes through teachers of each step."""
    told = dict(options)
    rate, clip = told.pop("rate"), told.pop("clip", 1.0)

    def one(given: tuple[jax.Array, Committee, Ratings]) -> Any:
        key, committee, ratings = given
        of_student, of_module, of_steps = jax.random.split(jax.random.fold_in(key, 2), 3)
        student = init_ncf(of_student, USERS, ITEMS, **SMALL)  # the same for all arms, and so are the batches
        committee = arm.members(committee)

        def draw(key: jax.Array) -> Batch:
            ids, y = draw_pairs(ratings, key)
            seen = committee.observe(tuple(views(ratings, ids)[i] for i in arm.teachers)) if arm.teachers else ()
            return Batch(x=ids, y=y, seen=seen)

        params = with_module(arm, of_module, student, committee, D1, D2)
        params, kept = train(loss_of(arm, told, student_apply, committee), params, draw, of_steps, rate, STEPS, clip)
        return judge_scores(partial(apply_ncf, strip(params)), jnp.arange(USERS), ratings.judged), kept

    return jax.lax.map(one, (keys, committees, ratings))


def published(data: Path) -> dict[str, list[float]]:
    """HR@10 and NDCG@10 of the models that He et al. published, on their test: our networks and measure are theirs."""
    users, items = map(jnp.asarray, read_leave_one_out(data))
    return {
        name: judge_scores(partial(apply_ncf, read_pretrained(data, name)), users, items).tolist()
        for name in ("gmf", "mlp")
    }
