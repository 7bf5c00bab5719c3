"""MNIST as the claims read it."""

import gzip
from pathlib import Path

import numpy as np

Part = tuple[np.ndarray, np.ndarray]


def read_mnist(data: Path) -> tuple[Part, Part]:
    """Images `uint8 [n, 784]` and labels `uint8 [n]` to train on, and those to test on, from `data/images/mnist`."""
    folder = data / "images" / "mnist"

    def idx(name: str, offset: int) -> np.ndarray:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    with np.load(folder / "mnist_train_images.npz") as file:
        images, labels = file["images"], file["labels"]
    tested = idx("t10k-images-idx3-ubyte.gz", 16), idx("t10k-labels-idx1-ubyte.gz", 8)
    return (images.reshape(-1, 784), labels), (tested[0].reshape(-1, 784), tested[1])
