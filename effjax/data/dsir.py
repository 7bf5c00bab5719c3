"""DSIR: texts of a large corpus that look like a small target, chosen by importance weights of hashed n-grams."""

import dataclasses
import re
import zlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from effjax.errors import ConfigError

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSIR:
    """Data selection with importance resampling (Xie et al., NeurIPS 2023), on the host, text by text.

    A text is a bag of words and pairs of words, hashed into buckets. Its log weight is the log ratio of what two
    bags-of-buckets models, one of the target and one of the raw texts, say of it; texts are then drawn in proportion
    to the weights, without replacement.

    Attributes:
        buckets: of n-grams.
        ngrams: longest run of words that counts.
        smoothing: added to every bucket's share of the target, as a count.

    Example:
        >>> raw = ["the cat sat on the mat", "import jax and numpy", "a dog sat on a cat", "def f(x): return x"]
        >>> weights = DSIR(buckets=1000).log_weights(raw, ["import os", "def g(y): return y"])
        >>> sorted(np.argsort(weights)[-2:].tolist())
        [1, 3]
    """

    buckets: int = 10_000
    ngrams: int = 2
    smoothing: float = 1e-2

    def __post_init__(self):
        if self.buckets < 2 or self.ngrams < 1 or not self.smoothing > 0:
            raise ConfigError(f"{self}: at least 2 buckets and n-grams of 1 word, smoothing above 0")

    def features(self, text: str) -> Int[np.ndarray, " grams"]:
        """The buckets of all n-grams; the same in every process."""
        words = _WORD.findall(text.lower())
        grams = (" ".join(words[i : i + k]) for k in range(1, self.ngrams + 1) for i in range(len(words) - k + 1))
        return np.fromiter((zlib.crc32(gram.encode()) % self.buckets for gram in grams), np.int64)

    def log_weights(self, raw: Iterable[str], target: Iterable[str]) -> Float[np.ndarray, " n"]:
        """One number a raw text.

        Raises:
            ConfigError: no n-gram on either side.
        """
        features = [self.features(text) for text in raw]
        wanted = [self.features(text) for text in target]
        shares = [self._shares(found, name) for found, name in ((wanted, "target"), (features, "raw"))]
        ratio = np.log(shares[0]) - np.log(shares[1])
        return np.array([ratio[own].sum() for own in features])

    def _shares(self, found: list[np.ndarray], name: str) -> np.ndarray:
        counts = sum((np.bincount(own, minlength=self.buckets) for own in found), np.zeros(self.buckets))
        if not counts.sum():
            raise ConfigError(f"the {name} texts have no words: give texts")
        return (counts + self.smoothing) / (counts.sum() + self.smoothing * self.buckets)

    def select(self, log_weights: Float[np.ndarray, " n"], count: int, *, seed: int = 0) -> Int[np.ndarray, " count"]:
        """Ids of `count` texts, one after another in proportion to the weights of those that are left (Gumbel top-k).

        Raises:
            ConfigError: more than there are.

        Example:
            >>> DSIR().select(np.array([0.0, 50.0, 49.0, -3.0]), 2).tolist()
            [1, 2]
        """
        if not 1 <= count <= len(log_weights):
            raise ConfigError(f"count={count} of {len(log_weights)} texts: must be between 1 and their number")
        keys = log_weights + np.random.default_rng(seed).gumbel(size=len(log_weights))
        return np.sort(np.argpartition(-keys, count - 1)[:count])
