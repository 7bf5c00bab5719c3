"""A byte language model with shifted ReLUs, trained on wikitext-2 in minutes, and the predictors of its neurons.

`DIR/text/wikitext-2` holds `valid.txt`, which is learned from, and `test.txt`: its first half calibrates, its second
half is judged.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.evaluate.loss import next_token_nll
from effjax.flash import apply_windowed, feed_forwards, oracles
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply
from effjax.sparsity.predictor import Predictor, Recorded, Training, train_predictor

FOLDER = "text/wikitext-2"
LENGTH = 320  # a prompt of 64 bytes and 256 new ones
CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    model_type="opt",
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
)
SHIFTED = dataclasses.replace(CONFIG, relu_shift=1.2)
THRESHOLD = float(np.log(0.7 / 0.3))  # of a predictor's logits: the 0.7 that the paper takes for Persimmon
STEPS, BATCH = ((CONFIG, 350, 2e-3), (SHIFTED, 140, 3e-4)), 4
TRAINING = Training(rank=8, loss="balanced_bce", learning_rate=3e-3, weight_decay=0.0, batch=512, epochs=4, enough=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Windows of bytes, int32 `[windows, LENGTH]`, of different parts."""

    train: np.ndarray
    calibration: np.ndarray
    judged: np.ndarray


def read_text(data: Path) -> Text:
    """Cuts the two files."""

    def windows(content: bytes) -> np.ndarray:
        count = len(content) // LENGTH
        return np.frombuffer(content[: count * LENGTH], np.uint8).reshape(count, LENGTH).astype(np.int32)

    train, test = (windows((data / FOLDER / f"{name}.txt").read_bytes()) for name in ("valid", "test"))
    return Text(train=train, calibration=test[: len(test) // 2], judged=test[len(test) // 2 :])


def train(text: Text, seed: int, *, chunk: int = 70) -> Any:
    """Parameters after both stages, the feed-forward weights rounded to float16 as a file holds them."""
    key = jax.random.key(seed)
    params: Any = Decoder(CONFIG).init(key, jnp.zeros((1, 4), jnp.int32))["params"]
    # Small at first, as in GPT-2: what enters the ReLUs then stays small enough for a shift to cut most of it.
    params = jax.tree.map(lambda x: 0.02 * x / jnp.std(x) if x.ndim == 2 else x, params)
    windows = jnp.asarray(text.train)
    for config, steps, rate in STEPS:
        apply = DecoderApply(config)
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 20, steps, rate / 10)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

        def step(carry: Any, key: jax.Array, apply: Any = apply, optimizer: Any = optimizer) -> tuple[Any, jax.Array]:
            params, state = carry
            batch = windows[jax.random.randint(key, (BATCH,), 0, len(windows))]

            def loss(params: Any) -> jax.Array:
                return next_token_nll(apply({"params": params}, batch[:, :-1]), batch[:, 1:]).mean()

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        run = jax.jit(lambda carry, keys, step=step: jax.lax.scan(step, carry, keys))
        carry = (params, optimizer.init(params))
        for part in jnp.split(jax.random.split(jax.random.fold_in(key, steps), steps), steps // chunk):
            carry, values = run(carry, part)
            print(f"{values.mean():.3f}", end=" ", flush=True)
        params = carry[0]
    print()

    def rounded(path: Any, x: jax.Array) -> jax.Array:
        kernel = any(getattr(k, "key", "") == "mlp" for k in path) and x.ndim == 2
        return x.astype(jnp.float16).astype(jnp.float32) if kernel else x

    return jax.tree_util.tree_map_with_path(rounded, params)


def record(
    params: Any, windows: np.ndarray, predictors: list[Any], window: int, threshold: float = THRESHOLD
) -> tuple[list[Any], list[Any]]:
    """Of every layer: what enters it with its active neurons, and its predicted ones, `bool[windows, time, neurons]`.

    With predictors in the loop, as decoding has them.
    """

    @jax.jit
    def run(batch: jax.Array) -> Any:
        seen: list[Any] = []
        apply_windowed(
            SHIFTED, predictors, window, threshold=threshold, see=lambda i, q, p, h: seen.append((q, h != 0, p))
        )({"params": params}, batch)
        return [(Recorded.make(q, active), predicted) for q, active, predicted in seen]

    parts = [run(windows[i : i + 8]) for i in range(0, len(windows), 8)]
    layers = [jax.tree.map(lambda *x: np.concatenate(x), *layer) for layer in zip(*parts, strict=True)]
    return [data for data, _ in layers], [np.asarray(predicted) for _, predicted in layers]


def train_predictors(params: Any, text: Text, seed: int, training: Training = TRAINING) -> list[Predictor]:
    """On 150 windows of the text that the model learned from, 48,000 tokens."""
    exact: list[Any] = list(oracles(feed_forwards(SHIFTED, params)))
    chosen = np.random.default_rng(seed).choice(len(text.train), 152, replace=False)
    data, _ = record(params, text.train[chosen], exact, 1, 0.0)
    keys = jax.random.split(jax.random.key(1000 + seed), len(data))
    run = jax.jit(train_predictor, static_argnames="training")
    return [run(k, jax.tree.map(jnp.asarray, d), training=training)[0] for k, d in zip(keys, data, strict=True)]


def perplexity(apply: Any, params: Any, windows: np.ndarray) -> float:
    """A byte's."""
    run = jax.jit(lambda p, w: next_token_nll(apply({"params": p}, w[:, :-1]), w[:, 1:]).mean())
    return float(np.exp(np.mean([run(params, windows[i : i + 8]) for i in range(0, len(windows), 8)])))
