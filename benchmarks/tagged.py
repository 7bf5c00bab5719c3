"""Texts with tags: rows of words and of labels, as the extreme-classification files have them."""

import gzip
from pathlib import Path

import numpy as np


def read_tagged(data: Path, name: str, part: str) -> tuple[np.ndarray, list[list[int]]]:
    """Which words a text has, `float32[rows, features]` of 0 and 1, and its labels; `part` is "train" or "test"."""
    with gzip.open(data / "extreme" / name / f"{part}.txt.gz", "rt") as file:
        rows, features, _ = map(int, file.readline().split())
        x, labels = np.zeros((rows, features), np.float32), []
        for i, line in enumerate(file):
            of_row, _, words = line.rstrip("\n").partition(" ")
            labels.append([int(label) for label in of_row.split(",") if label])
            x[i, [int(word.split(":")[0]) for word in words.split()]] = 1
    return x, labels
