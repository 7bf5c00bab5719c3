"""MovieLens-1M as the claims read it: who liked what, and the leave-one-out test of neural collaborative filtering."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

SPLITS = ("train", "valid", "test")


def read_liked(folder: Path) -> dict[str, np.ndarray]:
    """Who liked what, `bool[users, items]` by split; of `recsys/ml-1m-implicit` ratings from 3 on.

    Args:
        folder: holds train.txt, valid.txt and test.txt; a line is a user and the items it liked, numbered from 0.
    """
    rows = {}
    for split in SPLITS:
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        rows[split] = [[int(word) for word in line.split()] for line in lines]
    users = 1 + max(row[0] for part in rows.values() for row in part)
    items = 1 + max(max(row[1:], default=0) for part in rows.values() for row in part)
    liked = {split: np.zeros((users, items), bool) for split in SPLITS}
    for split, part in rows.items():
        for user, *found in part:
            liked[split][user, found] = True
    return liked


def with_negatives(wanted: np.ndarray, known: np.ndarray, rng: np.random.Generator, count: int = 99) -> np.ndarray:
    """`int[users, 1 + count]`: an item that each user wants, then others that it does not know."""
    rows = []
    for own, every in zip(wanted, known, strict=True):
        others = rng.choice(np.flatnonzero(~every), count, replace=False)
        rows.append([rng.choice(np.flatnonzero(own)), *others])
    return np.array(rows)


def read_leave_one_out(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Users `[n]` and items `[n, 100]`, the wanted one first, as He et al. (2017) published them.

    The numbers of users and items are theirs, not those of `read_liked`.
    """
    with np.load(data / "recsys/ncf-ml-1m-eval/ncf_ml1m_test_leave_one_out.npz") as file:
        return file["user"], np.concatenate([file["pos_item"][:, None], file["neg_items"]], axis=1)


def read_pretrained(data: Path, name: str) -> dict[str, Any]:
    """Their "gmf" or "mlp" of 8 features, as `effjax.models.ncf` takes it."""
    with np.load(data / f"recsys/ncf-ml-1m-eval/pretrained_{name}8.npz") as file:
        z = {key.split("__")[1]: jnp.asarray(file[key]) for key in file.files}
    params: dict[str, Any] = {
        name: {"user": z["user_embedding_W"], "item": z["item_embedding_W"]},
        "head": {"kernel": z["prediction_W"], "bias": z["prediction_b"]},
    }
    if name == "mlp":
        names = [f"layer{i}" for i in (1, 2, 3)]
        layers = [{"kernel": z[f"{n}_W"], "bias": z[f"{n}_b"]} for n in names]
        params["layers"] = {f"layer_{i}": layer for i, layer in enumerate(layers)}
    return params
