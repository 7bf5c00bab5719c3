"""What `train.sample` trains: a small convolutional network on images, or a decoder on windows of text."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.mnist import read_mnist
from benchmarks.resnet import read_cifar10
from effjax.data import python_docs
from effjax.errors import ConfigError
from effjax.models.cnn import apply_cnn, init_cnn
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from train.lm import encode_documents, train_tokenizer

WIDTHS = (16, 32, 64)
VOCAB, HIDDEN = 512, 64
HASHED = 64  # numbers a window of text is told apart by


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Examples, a network, and how it is judged.

    Attributes:
        n: number of examples.
        examples: a pytree of `[n, ...]`.
        features: `float[n, dim]` to hash.
        init: from a key to parameters.
        losses: `(params, examples) -> float[batch]`; images are brought to `size` where it is given.
        evaluate: held-out figures.
        measure: the one that is drawn.
        size: height and width of images.
        labels: number of classes, 0 for text.
        texts: the examples as text, where they are.
        described: for the configuration of the saved model.
    """

    n: int
    examples: Any
    features: Any
    init: Callable[[jax.Array], Any]
    losses: Callable[..., jax.Array]
    evaluate: Callable[[Any], dict[str, Any]]
    measure: str
    size: tuple[int, int] = (0, 0)
    labels: int = 0
    texts: Callable[[], list[str]] = list
    described: dict[str, Any] = dataclasses.field(default_factory=dict)

    def logits(self, params: Any) -> jax.Array:
        """Of all training images, some at a time."""
        return jax.lax.map(lambda x: apply_cnn(params, x[None])[0], self.examples[0], batch_size=256)


def read_task(config: Any) -> Task:
    """The task that the options of `train.sample` name.

    Raises:
        ConfigError: a file that cannot be read, or does not hold what it should.
    """
    return text_task(config) if config.dataset == "text" else image_task(*read_images(config))


Part = tuple[np.ndarray, np.ndarray]


def read_images(config: Any) -> tuple[Part, Part]:
    """Images `[n, height, width, channels]` and labels, to train on and to judge on."""
    path: Path = config.data
    try:
        if config.dataset == "mnist":
            (x, y), (tx, ty) = read_mnist(path)
            return (x.reshape(-1, 28, 28, 1), y), (tx.reshape(-1, 28, 28, 1), ty)
        if config.dataset == "cifar10":
            return read_cifar10(path, "train_jpeg"), read_cifar10(path, "test_decoded_2000")
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"--data {path}: cannot be read as {config.dataset} ({error})") from None
    if images.ndim == 3:
        images = images[..., None]
    judged = round(config.heldout * len(images))
    if images.ndim != 4 or labels.shape != images.shape[:1] or not 0 < judged < len(images) or labels.min() < 0:
        raise ConfigError(
            f"--data {path}: images {list(images.shape)}, labels {list(labels.shape)}: give [n, height, width] or "
            "[n, height, width, channels], and a label from 0 on for each"
        )
    order = np.random.default_rng(config.seed).permutation(len(images))
    return (images[order[judged:]], labels[order[judged:]]), (images[order[:judged]], labels[order[:judged]])


def image_task(train: Part, test: Part) -> Task:
    """A convolutional network; features are the images pooled to at most 8 x 8."""
    scale = max(float(train[0].max()), 1e-9)
    middle = float(train[0].mean()) / scale
    x, tx = (jnp.asarray(part[0] / scale - middle, jnp.float32) for part in (train, test))
    y, ty = (jnp.asarray(part[1], jnp.int32) for part in (train, test))
    n, height, width, channels = x.shape
    labels = int(max(y.max(), ty.max())) + 1

    def losses(params: Any, examples: Any, *, size: tuple[int, int] | None = None) -> jax.Array:
        images, own = examples
        if size is not None and size != (height, width):
            shape = (images.shape[0], *size, channels)
            images = jax.image.resize(images, shape, "bilinear", antialias=True)
        return optax.softmax_cross_entropy_with_integer_labels(apply_cnn(params, images), own)

    def pooled(images: jax.Array) -> jax.Array:
        shape = (min(height, 8), min(width, 8), channels)
        return jax.lax.map(lambda x: jax.image.resize(x, shape, "linear").reshape(-1), images, batch_size=1024)

    @jax.jit
    def evaluate(params: Any) -> dict[str, jax.Array]:
        found = jax.lax.map(lambda x: apply_cnn(params, x[None])[0], tx, batch_size=256)
        loss = optax.softmax_cross_entropy_with_integer_labels(found, ty).mean()
        return {"accuracy": (found.argmax(-1) == ty).mean(), "heldout_loss": loss}

    return Task(
        n=n,
        examples=(x, y),
        features=jax.jit(pooled)(x),
        init=partial(init_cnn, channels=channels, labels=labels, widths=WIDTHS),
        losses=losses,
        evaluate=evaluate,
        measure="accuracy",
        size=(height, width),
        labels=labels,
        described={"model_type": "cnn", "channels": channels, "labels": labels, "widths": list(WIDTHS)},
    )


def text_task(config: Any) -> Task:
    """A decoder of two layers on windows of text; features are random projections of how often tokens occur."""
    if config.text is None:
        documents, judged = python_docs.documents("train"), python_docs.documents("heldout")
    else:
        try:
            text = config.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--text {config.text}: cannot be read as UTF-8 text ({error})") from None
        at = round(len(text) * (1 - config.heldout))
        documents, judged = [text[:at]], [text[at:]]
    tokenizer = train_tokenizer(documents, VOCAB)
    if tokenizer.get_vocab_size() != VOCAB:
        raise ConfigError(f"vocab={VOCAB}: the text yields only {tokenizer.get_vocab_size()} entries; give more of it")
    rows, tested = (
        python_docs.windows(encode_documents(tokenizer, texts), config.context)[0][:-1] for texts in (documents, judged)
    )
    if min(len(rows), len(tested)) < 1 or len(rows) < config.batch:
        raise ConfigError(
            f"{len(rows)} windows of {config.context} tokens to train on, {len(tested)} to judge on: give more text, "
            "a shorter context or a smaller batch"
        )
    shape = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        max_position_embeddings=config.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(1,),
    )
    model = Decoder(shape)

    def losses(params: Any, windows: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply({"params": params}, windows[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(-1)

    directions = np.random.default_rng(0).normal(size=(VOCAB, HASHED)).astype(np.float32)
    held = jnp.asarray(tested[:512])

    @jax.jit
    def evaluate(params: Any) -> dict[str, jax.Array]:
        return {"heldout_loss": jax.lax.map(lambda w: losses(params, w[None])[0], held, batch_size=32).mean()}

    return Task(
        n=len(rows),
        examples=jnp.asarray(rows),
        features=jnp.asarray(np.stack([directions[row].mean(0) for row in rows])),
        init=lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        losses=losses,
        evaluate=evaluate,
        measure="heldout_loss",
        texts=lambda: tokenizer.decode_batch(rows.tolist()),
        described=shape.to_hf(),
    )
