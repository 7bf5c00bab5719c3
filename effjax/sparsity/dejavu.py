"""Deja Vu: the neurons and heads that a token needs, named by a predictor that reads an earlier hidden state.

Liu et al., "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time", ICML 2023.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from effjax.ops.neurons import Neurons
from effjax.ops.sparse_mlp import choose_neurons, sparse_mlp, top_mask
from effjax.sparsity.predictor import Predictor, Recorded, Training, train_predictor

Scores = Callable[[jax.Array], jax.Array]  # of a layer: queries [*tokens, d] -> scores [*tokens, neurons]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tap:
    """What one block of a dense run shows.

    Attributes:
        query: the residual stream that enters the block, before its first norm, `float[*tokens, d]`.
        activation: of the MLP's neurons, behind the activation function and the gate, `float[*tokens, neurons]`.
    """

    query: Float[Array, "*tokens d"]
    activation: Float[Array, "*tokens neurons"]


def needed_neurons(
    activation: Float[Array, "*tokens neurons"],
    *,
    share: float | None = None,
    norms: Float[Array, " neurons"] | None = None,
) -> Bool[Array, "*tokens neurons"]:
    """Labels: neurons that are not zero (ReLU), or a share of those that move the output most.

    Args:
        activation: of the neurons.
        share: of the neurons a token needs, for activations that are never zero (SwiGLU, GELU).
        norms: length of each neuron's row of the down projection; activations are weighed with them under `share`.

    Example:
        >>> needed_neurons(jnp.array([0.0, 2.0, -1.0, 0.5]), share=0.5, norms=jnp.array([1.0, 1.0, 1.0, 9.0])).tolist()
        [False, True, False, True]
    """
    if share is None:
        return activation != 0
    weighed = jnp.abs(activation) if norms is None else jnp.abs(activation) * norms
    return top_mask(weighed, max(1, round(share * activation.shape[-1])))


def needed_heads(
    outputs: Float[Array, "*tokens heads head_dim"], *, share: float = 0.3
) -> Bool[Array, "*tokens heads"]:
    """Labels: the share of heads whose outputs, before the output projection, are the longest.

    Example:
        >>> needed_heads(jnp.array([[[3.0], [1.0], [2.0]]]), share=0.67).tolist()
        [[True, False, True]]
    """
    lengths = jnp.linalg.norm(outputs, axis=-1)
    return top_mask(lengths, max(1, round(share * lengths.shape[-1])))


def collect_sparsity(
    params: Any,
    apply_with_taps: Callable[[Any, Any], Sequence[Tap]],
    batches: Iterable[Any],
    *,
    lookahead: bool = False,
    share: float | None = None,
    norms: Sequence[Float[Array, " neurons"]] | None = None,
) -> list[Recorded]:
    """Runs the dense model over batches and keeps what the predictor of each layer learns from.

    Args:
        params: of the model.
        apply_with_taps: `(params, batch)` -> a tap for every block, in order; it is jitted here.
        batches: of tokens.
        lookahead: pair the input of block `l - 1` with the neurons of block `l`, so that the prediction runs beside
            block `l - 1`; the first block is predicted from its own input.
        share, norms: of `needed_neurons`, a vector of norms for each layer.

    Returns:
        For every layer the queries and packed labels of all tokens.

    Raises:
        ValueError: no batch.
    """

    @jax.jit
    def record(params: Any, batch: Any) -> list[Recorded]:
        taps = apply_with_taps(params, batch)
        found = []
        for i, tap in enumerate(taps):
            labels = needed_neurons(tap.activation, share=share, norms=None if norms is None else norms[i])
            found.append(Recorded.make(taps[max(0, i - lookahead)].query, labels))
        return found

    runs = [record(params, batch) for batch in batches]
    if not runs:
        raise ValueError("collect_sparsity: no batch; give at least one")
    return [jax.tree.map(lambda *parts: jnp.concatenate(parts), *layer) for layer in zip(*runs, strict=True)]


def train_predictors(
    key: jax.Array, data: Sequence[Recorded], training: Training
) -> tuple[list[Predictor], list[dict[str, jax.Array]]]:
    """A predictor for every layer, and the history of its training; see `train_predictor`."""
    run = jax.jit(train_predictor, static_argnames="training")
    found = [run(k, layer, training=training) for k, layer in zip(jax.random.split(key, len(data)), data, strict=True)]
    return [predictor for predictor, _ in found], [history for _, history in found]


def neuron_masks(
    scores: Sequence[Scores], k: int | Sequence[int | None], *, lookahead: bool = False
) -> Callable[[int, Sequence[jax.Array], jax.Array], jax.Array]:
    """A hook that keeps, token by token, the neurons with the best scores: what masks cost in quality, at no speed.

    Args:
        scores: for every layer, of its queries: a predictor, or one of the controls below.
        k: neurons a token; for every layer its own, or one for all. None leaves a layer dense.
        lookahead: the query of block `l` is the input of block `l - 1`, as in `collect_sparsity`.

    Returns:
        `hook(layer, inputs, activation)` -> masked activation, with `inputs` of all blocks up to this one.

    Example:
        >>> hook = neuron_masks([lambda query: query], k=1)
        >>> hook(0, [jnp.array([1.0, 2.0])], jnp.array([7.0, 8.0])).tolist()
        [0.0, 8.0]
    """
    each = [k] * len(scores) if isinstance(k, int) else list(k)

    def hook(layer: int, inputs: Sequence[jax.Array], activation: jax.Array) -> jax.Array:
        keep = each[layer]
        if keep is None:
            return activation
        query = inputs[max(0, layer - lookahead)]
        return jnp.where(top_mask(scores[layer](query), keep), activation, 0)

    return hook


def head_masks(
    scores: Sequence[Scores], k: int, *, lookahead: bool = True
) -> Callable[[int, Sequence[jax.Array], jax.Array], jax.Array]:
    """A hook that keeps, token by token, the outputs of the `k` heads with the best scores.

    A simulation: keys and values of the other heads are there for later tokens, where a real decoder would have to
    compute them when such a token selects the head.

    Args:
        scores, lookahead: as in `neuron_masks`, for heads.
        k: heads a token.

    Returns:
        `hook(layer, inputs, outputs)` for head outputs before the output projection, `[*tokens, heads, head_dim]`.

    Example:
        >>> hook = head_masks([lambda query: query], k=1)
        >>> hook(0, [jnp.array([1.0, 2.0])], jnp.array([[7.0], [8.0]])).tolist()
        [[0.0], [8.0]]
    """

    def hook(layer: int, inputs: Sequence[jax.Array], outputs: jax.Array) -> jax.Array:
        query = inputs[max(0, layer - lookahead)]
        return jnp.where(top_mask(scores[layer](query), k)[..., None], outputs, 0)

    return hook


def static_scores(data: Recorded) -> Scores:
    """The control that ignores the token: how often each neuron was needed.

    Example:
        >>> data = Recorded.make(jnp.ones((2, 1)), jnp.array([[True, False], [True, True]]))
        >>> static_scores(data)(jnp.ones((3, 1)))[0].tolist()
        [1.0, 0.5]
    """
    often = data.labels.mean(0)
    return lambda query: jnp.broadcast_to(often, (*query.shape[:-1], len(often)))


def random_scores(key: jax.Array, neurons: int) -> Scores:
    """The control that knows nothing: other neurons for every token.

    Example:
        >>> random_scores(jax.random.key(0), 4)(jnp.ones((3, 1))).shape
        (3, 4)
    """
    return lambda query: jax.random.uniform(key, (*query.shape[:-1], neurons))


def union_density(masks: Bool[Array, "tokens neurons"], batch: int) -> float:
    """Share of neurons that some token of a batch needs, over whole batches of consecutive tokens.

    Example:
        >>> union_density(jnp.eye(4, dtype=bool), 2)
        0.5
    """
    whole = masks[: len(masks) // batch * batch]
    return float(jnp.mean(whole.reshape(-1, batch, masks.shape[-1]).any(1)))


def contextual_mlp(
    x: Float[Array, "*batch in"],
    neurons: Neurons,
    scores: Float[Array, "*batch neurons"],
    k: int | None,
    *,
    threshold: float | Float[Array, ""] = -math.inf,
    most_density: float = 0.5,
) -> Float[Array, "*batch out"]:
    """The MLP of a decode step on the neurons that a predictor names, or the whole one where that is faster.

    Rows of a batch share the union of their neurons. Where it may be more than `most_density` of all, it is counted
    when the program runs, and beyond that the dense MLP runs instead.

    Args:
        x: inputs of the MLP.
        neurons: its weights.
        scores: of the predictor: `predictor(query)`.
        k: neurons a row at most; None for a layer that was calibrated to be dense.
        threshold: of scores, for predictors that are read so; see `calibrate`.
        most_density: of the union.

    Example:
        >>> from effjax.ops.neurons import make_neurons
        >>> neurons = make_neurons(jnp.eye(4), jnp.eye(4))
        >>> contextual_mlp(jnp.arange(1.0, 5.0), neurons, jnp.array([0.0, 1.0, 0.0, 0.0]), 1).tolist()
        [0.0, 2.0, 0.0, 0.0]
    """
    every = jnp.arange(neurons.count, dtype=jnp.int32)
    if k is None:
        return sparse_mlp(x, neurons, every)
    chosen, count = choose_neurons(scores, k, threshold)
    most = max(1, int(most_density * neurons.count))
    if len(chosen) <= most:
        return sparse_mlp(x, neurons, chosen, count)
    return jax.lax.cond(
        count <= most,
        lambda: sparse_mlp(x, neurons, chosen[:most], jnp.minimum(count, most)),
        lambda: sparse_mlp(x, neurons, every),
    )


def scan_lookahead(
    block: Callable[[Any, jax.Array, Int32[Array, " room"], Int32[Array, ""]], jax.Array],
    layers: Any,
    predictors: Predictor,
    x: Float[Array, "*batch d"],
    k: int,
) -> Float[Array, "*batch d"]:
    """Blocks one after the other, the neurons of each chosen from what entered the block before it.

    The choice for the next block does not wait for this one: a compiler may run the two side by side.

    Args:
        block: `(layer, x, chosen, count)` -> what enters the next block.
        layers: a pytree of stacked layers, `[layers, ...]`.
        predictors: stacked likewise; the first reads the input of its own block.
        x: what enters the first block.
        k: neurons a row.
    """
    first = jax.tree.map(lambda a: a[0], predictors)
    # The predictor of the block behind; behind the last one nothing is used.
    behind = jax.tree.map(lambda a: jnp.roll(a, -1, axis=0), predictors)

    def step(carry: Any, layer: Any) -> tuple[Any, None]:
        x, chosen = carry
        params, predictor = layer
        following = choose_neurons(predictor(x), k)
        return (block(params, x, *chosen), following), None

    return jax.lax.scan(step, (x, choose_neurons(first(x), k)), (layers, behind))[0][0]
