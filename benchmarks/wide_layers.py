"""Three classifiers with wide output layers, each as its last layer and the queries that reach it."""

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.tagged import read_tagged

Queries = tuple[jax.Array, jax.Array]  # float32 [n, d] and labels int32 [n, several], padded with -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideLayer:
    """A frozen last layer and its inputs.

    Attributes:
        kernel, bias: `[d, labels]` and `[labels]`.
        train: to train hash functions on.
        held: to choose among them.
        test: to judge on; nothing else sees them.
    """

    kernel: jax.Array
    bias: jax.Array
    train: Queries
    held: Queries
    test: Queries

    @property
    def labels(self) -> int:
        return self.kernel.shape[1]


@partial(jax.jit, static_argnames=("hidden", "loss", "steps", "batch"))
def _fit(hidden: Any, loss: Any, params: Any, x: Any, y: Any, key: Any, rate: Any, *, steps: int, batch: int) -> Any:
    """Adam with a cosine schedule on random batches."""
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4))

    def step(carry: Any, now: Any) -> tuple[Any, None]:
        params, moments = carry
        key, i = now
        for_ids, own = jax.random.split(key)
        ids = jax.random.randint(for_ids, (batch,), 0, x.shape[0])

        def of(p: Any) -> jax.Array:
            return loss(hidden(p, x[ids], own) @ p["kernel"] + p["bias"], y[ids])

        updates, moments = optimizer.update(jax.grad(of)(params), moments, params)
        speed = -rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        return (optax.apply_updates(params, jax.tree.map(lambda u: speed * u, updates)), moments), None

    along = jax.random.split(key, steps), jnp.arange(steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), along)[0][0]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a query's labels, and over queries."""
    real = labels >= 0
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0), 1)
    return (jnp.where(real, nll, 0).sum(1) / jnp.maximum(real.sum(1), 1)).mean()


def _dense(key: jax.Array, n: int, m: int) -> jax.Array:
    return jax.random.normal(key, (n, m)) / np.sqrt(n)


def _word_hidden(p: Any, around: jax.Array, key: jax.Array) -> jax.Array:
    del key
    return jax.nn.relu(p["words"][around].reshape(len(around), -1) @ p["inner"] + p["inner bias"])


def wikitext(data: Path, seed: int, vocabulary: int = 8000) -> WideLayer:
    """A word from its two left and two right neighbours: embeddings of 64, one hidden layer of 64, 8,000 words.

    The last tenth of the text is held out: its first half to choose hash functions on, its second to judge.
    """
    folder = data / "text" / "wikitext-2"
    words = " ".join((folder / f"{part}.txt").read_text(encoding="utf8") for part in ("valid", "test"))
    tokens = words.replace("\n", " <eos> ").split()
    common = {word: i for i, (word, _) in enumerate(Counter(tokens).most_common(vocabulary))}
    text = np.array([common.get(word, common["<unk>"]) for word in tokens], np.int32)
    middle = np.arange(2, len(text) - 2)
    around, labels = text[middle[:, None] + np.array([-2, -1, 1, 2])], text[middle][:, None]
    cut = len(middle) * 9 // 10
    keys = jax.random.split(jax.random.key(seed), 6)
    params = {
        "words": 0.1 * jax.random.normal(keys[0], (vocabulary, 64)),
        "inner": _dense(keys[1], 256, 64),
        "inner bias": jnp.zeros(64),
        "kernel": _dense(keys[2], 64, vocabulary),
        "bias": jnp.zeros(vocabulary),
    }
    x, y = jnp.asarray(around[:cut]), jnp.asarray(labels[:cut])
    fitted = _fit(_word_hidden, _cross_entropy, params, x, y, keys[3], jnp.float32(4e-3), steps=1500, batch=256)

    def queries(ids: np.ndarray) -> Queries:
        hidden = jax.jit(_word_hidden)(fitted, jnp.asarray(around[ids]), keys[4])
        return hidden, jnp.asarray(labels[ids])

    drawn = np.random.default_rng(seed).choice(cut, 60_000, replace=False)
    half = (cut + len(middle)) // 2
    return WideLayer(
        kernel=fitted["kernel"],
        bias=fitted["bias"],
        train=queries(drawn),
        held=queries(np.arange(cut, half)[:: (half - cut) // 4000]),
        test=queries(np.arange(half, len(middle))[:10_000]),
    )


def _tag_hidden(p: Any, x: jax.Array, key: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 0.5, (x.shape[0], p["inner"].shape[1]))
    return 2 * kept * jax.nn.relu(x @ p["inner"] + p["inner bias"])


def delicious(data: Path, seed: int) -> WideLayer:
    """Pages described by 500 words, 983 tags of which a page has 19: one hidden layer of 128, with dropout."""

    def read(part: str) -> tuple[np.ndarray, np.ndarray]:
        x, tags = read_tagged(data, "delicious", part)
        y = np.full((len(x), max(map(len, tags))), -1, np.int32)
        for i, row in enumerate(tags):
            y[i, : len(row)] = row
        return x, y

    (x, y), (test_x, test_y) = read("train"), read("test")
    order = np.random.default_rng(seed).permutation(len(x))
    held, train = order[:2000], order[2000:]
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "inner": _dense(keys[0], 500, 128),
        "inner bias": jnp.zeros(128),
        "kernel": _dense(keys[1], 128, 983),
        "bias": jnp.zeros(983),
    }
    some = jnp.asarray(x[train]), jnp.asarray(y[train])
    fitted = _fit(_tag_hidden, _cross_entropy, params, *some, keys[2], jnp.float32(2e-3), steps=2000, batch=256)

    def queries(x: np.ndarray, y: np.ndarray) -> Queries:
        return jax.nn.relu(jnp.asarray(x) @ fitted["inner"] + fitted["inner bias"]), jnp.asarray(y)

    return WideLayer(
        kernel=fitted["kernel"],
        bias=fitted["bias"],
        train=queries(x[train], y[train]),
        held=queries(x[held], y[held]),
        test=queries(test_x, test_y),
    )


def synthetic(
    seed: int,
    labels: int = 100_000,
    d: int = 128,
    clusters: int = 2000,
    apart: float = 0.13,
    noise: float = 0.7,
) -> WideLayer:
    """Queries around 100,000 clustered label vectors, of long-tailed frequency, and the best layer there is for them.

    A label's vector is that of its cluster and a little (`apart`) of its own, in channels whose variance falls as
    1 / rank; the frequency of a label falls as 1 / rank, and ranks know nothing of clusters. A query is its label's
    vector and noise of the same size in all channels. The layer is the posterior of exactly that model, `w = mu /
    noise**2` and `b = log p - |mu|**2 / (2 noise**2)`: no trained layer can be right more often, so that full inference
    is as strong a baseline as can be; it is wrong about one query in five. The layer is scaled (`w` up, `h` down, by 8)
    so that weights outweigh biases: random hashes need that, learned ones do not.
    Hash functions see the layer and labelled queries alone, neither clusters nor frequencies.

    What it flatters: clusters stand out from the noise in the first channels, so that single projections say much. With
    the noise of `apart=0.2, noise=1` they say less, and every hash retrieves less.
    """
    keys = jax.random.split(jax.random.key(seed), 8)
    scale = 1 / jnp.sqrt(1.0 + jnp.arange(d))
    scale = scale * jnp.sqrt(d / jnp.sum(scale**2))
    of = jax.random.randint(keys[0], (labels,), 0, clusters)
    centres, own = jax.random.normal(keys[1], (clusters, d)), jax.random.normal(keys[2], (labels, d))
    mu = scale * (centres[of] + apart * own)
    log_p = -jnp.log(1.0 + jax.random.permutation(keys[3], labels))
    below = np.cumsum(np.exp(np.asarray(log_p, np.float64)))
    bias = log_p - jnp.sum(mu**2, 1) / (2 * noise**2)

    def queries(key: jax.Array, n: int) -> Queries:
        for_labels, for_noise = jax.random.split(key)
        drawn = np.searchsorted(below, below[-1] * np.asarray(jax.random.uniform(for_labels, (n,)), np.float64))
        y = jnp.asarray(np.minimum(drawn, labels - 1), jnp.int32)
        return (mu[y] + noise * jax.random.normal(for_noise, (n, d))) / 8, y[:, None]

    return WideLayer(
        kernel=8 * mu.T / noise**2,
        bias=bias - bias.mean(),
        train=queries(keys[4], 60_000),
        held=queries(keys[5], 4000),
        test=queries(keys[6], 10_000),
    )
