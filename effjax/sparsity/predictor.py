"""Predictors of active neurons or heads: two thin matrices, trained on recorded activations, calibrated to a recall."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """Scores `query @ reduce @ expand` of every neuron; no bias, nothing between the two.

    Attributes:
        reduce: `float[d, rank]`.
        expand: `float[rank, neurons]`.

    Example:
        >>> init_predictor(jax.random.key(0), 8, 2, 32)(jnp.ones((5, 8))).shape
        (5, 32)
    """

    reduce: Float[Array, "d rank"]
    expand: Float[Array, "rank neurons"]

    def __call__(self, query: Float[Array, "*batch d"]) -> Float[Array, "*batch neurons"]:
        return query.astype(self.reduce.dtype) @ self.reduce @ self.expand


def init_predictor(key: jax.Array, d: int, rank: int, neurons: int) -> Predictor:
    """Uniform in `±1 / sqrt(inputs)` of each matrix."""
    keys = jax.random.split(key)
    shapes = ((d, rank), (rank, neurons))
    reduce, expand = (
        jax.random.uniform(k, s, minval=-1 / math.sqrt(s[0]), maxval=1 / math.sqrt(s[0]))
        for k, s in zip(keys, shapes, strict=True)
    )
    return Predictor(reduce=reduce, expand=expand)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """What a predictor learns from, a row a token.

    Attributes:
        queries: `float[n, d]`.
        packed: which neurons each token needs, eight to a byte: `uint8[n, ceil(neurons / 8)]`.
        neurons: how many.
    """

    queries: Float[Array, "n d"]
    packed: UInt8[Array, "n bytes"]
    neurons: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def make(cls, queries: Float[Array, "*n d"], labels: Bool[Array, "*n neurons"]) -> "Recorded":
        """Flattens and packs.

        Raises:
            ValueError: queries and labels of different numbers of tokens.

        Example:
            >>> Recorded.make(jnp.ones((2, 3, 8)), jnp.ones((2, 3, 20), bool)).packed.shape
            (6, 3)
        """
        if queries.shape[:-1] != labels.shape[:-1]:
            raise ValueError(f"queries {list(queries.shape)} and labels {list(labels.shape)}: one of each a token")
        neurons = labels.shape[-1]
        packed = jnp.packbits(labels.reshape(-1, neurons), axis=1)
        return cls(queries=queries.reshape(-1, queries.shape[-1]), packed=packed, neurons=neurons)

    @property
    def labels(self) -> Bool[Array, "n neurons"]:
        return jnp.unpackbits(self.packed, axis=-1, count=self.neurons).astype(bool)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: Any) -> "Recorded":
        """Some of the tokens: a slice, or their numbers."""
        return dataclasses.replace(self, queries=self.queries[index], packed=self.packed[index])


Loss = Callable[[jax.Array, jax.Array], jax.Array]


def weighted_bce(
    logits: Float[Array, "n neurons"], labels: Bool[Array, "n neurons"], *, smoothing: float = 0.005
) -> Float[Array, ""]:
    """Binary cross entropy in which a negative weighs the share of positives in the batch, plus `smoothing`.

    The loss of Deja Vu (Liu et al., ICML 2023), as its published training script has it.

    Example:
        >>> round(float(weighted_bce(jnp.zeros((1, 2)), jnp.array([[True, False]]), smoothing=0.0)) / math.log(2), 4)
        0.75
    """
    y = labels.astype(logits.dtype)
    weight = jnp.where(labels, 1.0, y.mean() + smoothing)
    return jnp.mean(weight * optax.sigmoid_binary_cross_entropy(logits, y))


def balanced_bce(logits: Float[Array, "n neurons"], labels: Bool[Array, "n neurons"]) -> Float[Array, ""]:
    """The mean over positives and the mean over negatives, each half: for predictors that are read by a threshold.

    The balanced loss of "LLM in a flash" (Alizadeh et al., 2023).

    Example:
        >>> round(float(balanced_bce(jnp.zeros((1, 4)), jnp.array([[True, False, False, False]]))) / math.log(2), 4)
        1.0
    """
    each = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
    positives = labels.sum()
    hit = jnp.sum(jnp.where(labels, each, 0.0)) / jnp.maximum(positives, 1)
    missed = jnp.sum(jnp.where(labels, 0.0, each)) / jnp.maximum(labels.size - positives, 1)
    return 0.5 * (hit + missed)


LOSSES: dict[str, Loss] = {"weighted_bce": weighted_bce, "balanced_bce": balanced_bce}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a predictor is trained; the defaults are those of the published script for an MLP.

    Attributes:
        rank: of the predictor.
        loss: "weighted_bce" or "balanced_bce".
        learning_rate, weight_decay: of AdamW; the script takes 1e-4 for heads.
        batch: tokens a step.
        epochs: at most.
        patience: epochs without a gain in recall after which it stops.
        enough: recall above which it stops.
        held_out: share of the tokens, the last ones, that recall is measured on.
        k: neurons of the recall; where None as many as are needed on average.
    """

    rank: int = 1000
    loss: Literal["weighted_bce", "balanced_bce"] = "weighted_bce"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 1024
    epochs: int = 20
    patience: int = 5
    enough: float = 0.99
    held_out: float = 0.05
    k: int | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}: choose one of {', '.join(LOSSES)}")
        if min(self.rank, self.batch, self.epochs, self.patience) < 1 or not 0 < self.held_out < 1:
            raise ValueError(f"{self}: sizes are positive, and held_out is a share between 0 and 1")


def recall_at(
    logits: Float[Array, "n neurons"], labels: Bool[Array, "n neurons"], k: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(needed neurons that are among the `k` best, needed neurons).

    Example:
        >>> hits, needed = recall_at(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[True, False, True]]), 2)
        >>> float(hits), float(needed)
        (1.0, 2.0)
    """
    hits = jnp.take_along_axis(labels, jax.lax.top_k(logits, k)[1], axis=-1)
    return hits.sum(dtype=jnp.float32), labels.sum(dtype=jnp.float32)


def train_predictor(
    key: jax.Array, data: Recorded, training: Training
) -> tuple[Predictor, dict[str, Float[Array, " epochs"]]]:
    """Trains by AdamW and returns the weights of the epoch with the best recall on held-out tokens.

    One program: it can be jitted, and mapped over layers of equal shape.

    Args:
        key: for the first weights and the order of tokens.
        data: at least a batch and one held-out token; shuffle it before where its last tokens are unlike the others.

    Returns:
        The predictor, and "loss" and "recall" of every epoch; those after it stopped are NaN.

    Raises:
        ValueError: fewer tokens than that.

    Example:
        >>> queries = jax.random.normal(jax.random.key(0), (600, 4))
        >>> data = Recorded.make(queries, queries @ jax.random.normal(jax.random.key(1), (4, 16)) > 1)
        >>> training = Training(rank=4, batch=64, epochs=20, learning_rate=1e-2, k=8)
        >>> predictor, history = train_predictor(jax.random.key(2), data, training)
        >>> float(jnp.nanmax(history["recall"])) > 0.9
        True
    """
    held = max(1, round(len(data) * training.held_out))
    count = len(data) - held
    steps = count // training.batch
    if steps < 1:
        raise ValueError(
            f"train_predictor: {len(data)} tokens give no batch of {training.batch} beside {held} held out"
        )
    valid, labels = data[count:], data[count:].labels
    needed = labels.sum(1).mean()
    loss = LOSSES[training.loss]
    optimizer = optax.adamw(training.learning_rate, weight_decay=training.weight_decay)
    for_weights, for_order = jax.random.split(key)
    start = init_predictor(for_weights, data.queries.shape[1], training.rank, data.neurons)

    def score(predictor: Predictor) -> jax.Array:
        logits = predictor(valid.queries)
        if training.k is not None:
            hits, of = recall_at(logits, labels, training.k)
        else:  # as many as the mean, which is no static number
            place = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
            hits, of = jnp.sum(labels & (place < needed)), labels.sum()
        return hits / jnp.maximum(of, 1)

    def step(carry: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
        predictor, state = carry
        batch = data[ids]
        value, gradient = jax.value_and_grad(lambda p: loss(p(batch.queries), batch.labels))(predictor)
        updates, state = optimizer.update(gradient, state, predictor)  # type: ignore[arg-type]
        return (optax.apply_updates(predictor, updates), state), value

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        def run(carry: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            trained, best, best_recall, waited = carry
            order = jax.random.permutation(key, count)[: steps * training.batch].reshape(steps, training.batch)
            trained, losses = jax.lax.scan(step, trained, order)
            recall = score(trained[0])
            better = recall > best_recall
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), trained[0], best)
            best_recall = jnp.maximum(recall, best_recall)
            return (trained, best, best_recall, jnp.where(better, 0, waited + 1)), (losses.mean(), recall)

        _, _, best_recall, waited = carry
        done = (waited >= training.patience) | (best_recall > training.enough)
        nothing = (jnp.float32(jnp.nan), jnp.float32(jnp.nan))
        return jax.lax.cond(done, lambda carry: (carry, nothing), run, carry)

    start_state = optimizer.init(start)  # type: ignore[arg-type]
    first = ((start, start_state), start, jnp.float32(-1.0), jnp.int32(0))
    (_, best, _, _), (losses, recalls) = jax.lax.scan(epoch, first, jax.random.split(for_order, training.epochs))
    return best, {"loss": losses, "recall": recalls}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """How many neurons a predictor must name to find a wanted share of those that are needed.

    Attributes:
        k: best scores to take, or None where dense is better: `most_density` does not suffice.
        threshold: score above which neurons are taken, if they are chosen so; -inf where dense is better.
        recall: what `k` reaches on the tokens it was calibrated on, in [0, 1].
        density: `k` over the number of neurons; 1 for dense.
        threshold_density: share of neurons above the threshold, on average.
    """

    k: int | None
    threshold: float
    recall: float
    density: float
    threshold_density: float


def calibrate(
    logits: Float[Array, "n neurons"],
    labels: Bool[Array, "n neurons"],
    *,
    recall: float,
    multiple: int = 1,
    most_density: float = 0.5,
) -> Calibrated:
    """The smallest `k`, and the greatest threshold, with the wanted recall on held-out tokens.

    Args:
        logits: of the predictor, of tokens it was not trained on.
        labels: which neurons they need.
        recall: wanted share of the needed neurons, in (0, 1].
        multiple: of `k`, as kernels like it.
        most_density: share of the neurons above which the layer is left dense; kernels that read rows one by one are
            slower than a dense product from about there on.

    Raises:
        ValueError: a recall out of range, or labels without a needed neuron.

    Example:
        >>> logits = jnp.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
        >>> found = calibrate(logits, logits > 2.5, recall=1.0)
        >>> found.k, found.recall, found.density, round(found.threshold, 4)
        (2, 1.0, 0.5, 3.0)
        >>> calibrate(logits, logits < 2.5, recall=1.0).k is None
        True
    """
    if not 0 < recall <= 1:
        raise ValueError(f"calibrate: recall={recall}: a share in (0, 1]")
    neurons = labels.shape[-1]
    places, low = jax.jit(_needed_places)(logits, labels)
    needed = int(labels.sum())
    if needed == 0:
        raise ValueError("calibrate: no token needs a neuron; record labels from inputs like those to come")
    # The place among the scores, and the score, that the wanted share of needed neurons reaches.
    last = math.ceil(recall * needed) - 1
    k = min(neurons, -(-(int(places[last]) + 1) // multiple) * multiple)
    threshold = float(jnp.nextafter(low[last], -jnp.inf))
    above = float(jnp.mean(logits > threshold))
    found = float(jnp.sum(places < k)) / needed
    if k > most_density * neurons:
        return Calibrated(k=None, threshold=-math.inf, recall=1.0, density=1.0, threshold_density=1.0)
    return Calibrated(k=k, threshold=threshold, recall=found, density=k / neurons, threshold_density=above)


def _needed_places(logits: jax.Array, labels: jax.Array) -> tuple[Int32[Array, " all"], Float[Array, " all"]]:
    """Places of needed neurons among the scores of their token, ascending; and their scores, descending."""
    place = jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)
    none = jnp.iinfo(jnp.int32).max
    places = jnp.sort(jnp.where(labels, place, none).ravel())
    return places, -jnp.sort(jnp.where(labels, -logits, jnp.inf).ravel())
