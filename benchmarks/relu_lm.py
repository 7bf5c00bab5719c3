"""A small ReLU language model over words, trained on wikitext-2 in minutes: its neurons are sparse by nature.

`DIR/text/wikitext-2` holds `valid.txt` and `test.txt`: the first and half of the second are learned from, the rest is
judged.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.sparsity.dejavu import Tap

FOLDER = "text/wikitext-2"
LENGTH = 192
Hook = Callable[[int, Sequence[jax.Array], jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Word numbers in windows.

    Attributes:
        train, judged: int32 `[windows, LENGTH + 1]`.
    """

    train: np.ndarray
    judged: np.ndarray


def read_text(data: Path, vocabulary: int = 2000) -> Text:
    """Words by frequency in what is learned from; all others are one word."""
    parts = {name: (data / FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in ("valid", "test")}
    words = {name: [w for line in text.splitlines() for w in [*line.split(), "<eos>"]] for name, text in parts.items()}
    half = len(words["test"]) // 2
    train, judged = words["valid"] + words["test"][:half], words["test"][half:]
    kept = [w for w, _ in collections.Counter(w for w in train if w != "<unk>").most_common(vocabulary - 1)]
    numbers = {w: i + 1 for i, w in enumerate(kept)}

    def windows(words: list[str]) -> np.ndarray:
        ids = np.asarray([numbers.get(w, 0) for w in words], np.int32)
        count = (len(ids) - 1) // LENGTH
        return np.stack([ids[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])

    return Text(train=windows(train), judged=windows(judged))


class Block(nn.Module):
    """Attention and a ReLU MLP, each behind a norm; hooks see the block's input and may change what is inside."""

    heads: int
    neurons: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, at_heads: Any, at_mlp: Any) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = x.shape[-1]
        q, k, v = jnp.split(nn.Dense(3 * width, name="qkv")(nn.LayerNorm(name="ln1")(x)), 3, axis=-1)
        shape = (*x.shape[:-1], self.heads, width // self.heads)
        y = jax.nn.dot_product_attention(*(a.reshape(shape) for a in (q, k, v)), is_causal=True)
        y = y if at_heads is None else at_heads(y)
        after = x + drop(nn.Dense(width, name="out")(y.reshape(x.shape)))
        h = jax.nn.relu(nn.Dense(self.neurons, name="up")(nn.LayerNorm(name="ln2")(after)))
        h = h if at_mlp is None else at_mlp(h)
        return after + drop(nn.Dense(width, name="down")(h))


class ReluLM(nn.Module):
    """A decoder with learned positions and tied embeddings.

    `at_mlp` and `at_heads` are hooks `(layer, inputs of the blocks so far, array)` for the neurons `[batch, time,
    neurons]` and the head outputs `[batch, time, heads, head_dim]`.
    """

    vocabulary: int = 2000
    layers: int = 3
    width: int = 96
    neurons: int = 384
    heads: int = 4
    dropout: float = 0.2

    @nn.compact
    def __call__(
        self, tokens: jax.Array, train: bool = False, at_mlp: Hook | None = None, at_heads: Hook | None = None
    ) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        places = self.param("positions", nn.initializers.normal(0.02), (LENGTH, self.width))
        x = embed(tokens) + places[: tokens.shape[1]]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        inputs: list[jax.Array] = []
        for i in range(self.layers):
            inputs = [*inputs, x]
            block = Block(self.heads, self.neurons, self.dropout, name=f"block{i}")
            hooks = [None if h is None else lambda a, h=h, i=i, s=inputs: h(i, s, a) for h in (at_heads, at_mlp)]
            x = block(x, train, *hooks)
        return embed.attend(nn.LayerNorm(name="ln")(x))


def taps(model: ReluLM) -> Callable[[Any, jax.Array], list[Tap]]:
    """`apply_with_taps` of `effjax.sparsity.dejavu.collect_sparsity`."""

    def run(params: Any, tokens: jax.Array) -> list[Tap]:
        found: list[Tap] = []

        def hook(layer: int, inputs: Sequence[jax.Array], activation: jax.Array) -> jax.Array:
            found.append(Tap(query=inputs[-1], activation=activation))
            return activation

        model.apply({"params": params}, tokens, at_mlp=hook)
        return found

    return run


def losses(model: ReluLM, params: Any, windows: jax.Array, **how: Any) -> jax.Array:
    """Negative log-likelihood of every word, `[windows, LENGTH]`."""
    logits = model.apply({"params": params}, windows[:, :-1], **how)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])  # type: ignore[arg-type]


def train_lm(model: ReluLM, text: Text, seed: int, *, steps: int = 1500, batch: int = 8, chunk: int = 100) -> Any:
    """AdamW at 2e-3 with warm-up and cosine decay on random windows; returns the parameters."""
    keys = jax.random.split(jax.random.key(seed), 3)
    windows = jnp.asarray(text.train)
    params = model.init(keys[0], windows[:1, :-1])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        for_ids, for_dropout = jax.random.split(key)
        ids = jax.random.randint(for_ids, (batch,), 0, len(windows))

        def loss(params: Any) -> jax.Array:
            return losses(model, params, windows[ids], train=True, rngs={"dropout": for_dropout}).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry = (params, optimizer.init(params))
    for part in jnp.split(jax.random.split(keys[1], steps), steps // chunk):
        carry, values = run(carry, part)
        print(f"loss {values.mean():.3f}", end=" ", flush=True)
    print()
    return carry[0]


def perplexity(model: ReluLM, params: Any, windows: np.ndarray, *, batch: int = 32, **hooks: Hook) -> float:
    """Over all words of the windows, with hooks inside."""
    run = jax.jit(lambda params, part: losses(model, params, part, **hooks).sum())
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    total = sum(float(run(params, part)) for part in parts)
    return float(np.exp(total / (len(windows) * LENGTH)))
