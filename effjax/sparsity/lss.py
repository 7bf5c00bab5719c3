"""LSS, label super sampling: hash functions trained so that a query meets its label, not merely the largest logits."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from effjax.hashing.lsh import SignProjections
from effjax.quantize.checks import check_size
from effjax.sparsity.label_tables import LabelTables, build_tables, slots, with_last


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSS:
    """How hash functions are trained (Liu et al., "Climbing the WOL: Training for Cheaper Inference", arXiv
    2007.01230).

    The network is frozen. A label is the vector `[w, b]` and a query `[h, 1]`, so that their product is the logit; both
    are hashed by the signs of the same projections, which begin as SimHash. In turn, tables are built from all labels;
    pairs of queries and labels are collected; and Adam takes a few steps on the projections with those pairs. A bit is
    relaxed to `tanh(sharpness * projection of the unit vector)`, and the score of a pair in a table is the sum of the
    products of its relaxed bits, up to `hashes`. The loss is the cross entropy of `sigmoid(score - offset)`, averaged
    over tables and pairs: 1 for every query with each of its labels, 0 for labels that it retrieves wrongly, of which
    those of small logit are preferred. Either kind weighs as much in all.

    A collision needs all bits of a table equal. A cross entropy without offset is content far earlier, and training
    then only trades recall for size as fewer random hashes would; `hashes / 2` moves the frontier. (The paper does not
    state one; the rest of the loss is that of MONGOOSE, by the same group.)

    Attributes:
        hashes: bits a table, 1 to 24; a table has `2**hashes` buckets.
        tables: independent ones; a label is retrieved where any table has it in the query's bucket.
        sharpness: of the relaxed bits.
        offset: see above; None for `hashes / 2`.
        positive_weight: of the pairs with true labels: more of it keeps recall, and retrieves more.
        rebuilds: of the tables.
        queries: drawn at each rebuild.
        steps: of Adam at each rebuild.
        negatives: wrongly retrieved labels of a query, the half of twice as many draws that has the smaller logits.
        learning_rate: of Adam.

    Example:
        >>> LSS(hashes=6, tables=10).middle
        3.0
    """

    hashes: int = 6
    tables: int = 10
    sharpness: float = 3.0
    offset: float | None = None
    positive_weight: float = 1.0
    rebuilds: int = 150
    queries: int = 600
    steps: int = 5
    negatives: int = 8
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        if not 1 <= self.hashes <= 24:
            raise ValueError(f"hashes={self.hashes}: choose 1 to 24; a table has 2**hashes buckets")
        counts = {name: getattr(self, name) for name in ("tables", "rebuilds", "queries", "steps", "negatives")}
        check_size("a positive number", **counts)
        for name in ("sharpness", "positive_weight", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number")

    @property
    def middle(self) -> float:
        """The score that counts as neither a collision nor none."""
        return self.hashes / 2 if self.offset is None else self.offset


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainedHashes:
    """Every state that training went through; the first is SimHash. They are small: choose one on held-out queries.

    Attributes:
        directions: `float32[rebuilds + 1, d + 1, hashes, tables]`.
        recall: `float32[rebuilds + 1]`, the share of labels that were retrieved, on the queries of the next rebuild.
        slots: `float32[rebuilds + 1]`, labels retrieved by such a query, counted once a table that holds them.
    """

    directions: Float[Array, "states d1 hashes tables"]
    recall: Float[Array, "states"]
    slots: Float[Array, "states"]

    def __getitem__(self, state: int) -> SignProjections:
        """The hash functions of a state, for `build_label_head`."""
        directions = self.directions[state]
        return SignProjections(directions=directions, rehash=None, buckets=2 ** directions.shape[1])


def train_hashes(
    method: LSS,
    key: jax.Array,
    h: Float[Array, "n d"],
    labels: Int32[Array, "n *several"],
    kernel: Float[Array, "d labels"],
    bias: Float[Array, "labels"] | None = None,
) -> TrainedHashes:
    """Trains hash functions for a dense layer on queries whose labels are known.

    Args:
        method: how.
        key: of the first projections, the queries of each rebuild and the negatives.
        h: inputs of the layer.
        labels: one a query, or several padded with -1.
        kernel, bias: of the layer, as Flax has them.

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (8, 100))
        >>> labels = jnp.arange(1000) % 100
        >>> h = kernel.T[labels] + 0.5 * jax.random.normal(jax.random.key(1), (1000, 8))
        >>> trained = train_hashes(LSS(hashes=4, tables=3, rebuilds=30), jax.random.key(2), h, labels, kernel)
        >>> trained.directions.shape, bool(trained.recall[-1] > trained.recall[0])
        ((31, 9, 4, 3), True)
    """
    bias = jnp.zeros(kernel.shape[-1:]) if bias is None else bias
    if h.ndim != 2 or labels.shape[:1] != h.shape[:1] or labels.ndim > 2 or h.shape[1:] != kernel.shape[:1]:
        raise ValueError(
            f"train_hashes: h {h.shape}, labels {labels.shape} and kernel {kernel.shape}: give [n, d], [n] or [n, "
            "several] and [d, labels]"
        )
    if bias.shape != kernel.shape[1:]:
        raise ValueError(f"train_hashes: bias {bias.shape} does not fit the {kernel.shape[1]} labels of the kernel")
    return _train(method, key, h, labels[:, None] if labels.ndim == 1 else labels, with_last(kernel.T, bias))


@partial(jax.jit, static_argnames="method")
def _train(method: LSS, key: jax.Array, h: jax.Array, labels: jax.Array, v: jax.Array) -> TrainedHashes:
    optimizer = optax.adam(method.learning_rate)
    first, key = jax.random.split(key)
    start = SignProjections.make(first, dim=v.shape[1], rows=method.tables, hashes=method.hashes)

    def rebuild(carry: Any, key: jax.Array) -> Any:
        directions, moments = carry
        lsh = dataclasses.replace(start, directions=directions)
        for_rows, for_negatives = jax.random.split(key)
        rows = jax.random.randint(for_rows, (method.queries,), 0, h.shape[0])
        q, own = with_last(h[rows], jnp.ones(method.queries)), labels[rows]
        of_labels, codes = lsh(v), lsh(q)
        tables = build_tables(of_labels, lsh.buckets)
        wrong, mined = negatives(method, for_negatives, tables, codes, q, own, v)

        def step(carry: Any, _: None) -> Any:
            directions, moments = carry
            gradient = jax.grad(pair_loss, argnums=1)(method, directions, q, v[own], own >= 0, v[wrong], mined)
            updates, moments = optimizer.update(gradient, moments, directions)
            return (optax.apply_updates(directions, updates), moments), None

        after, _ = jax.lax.scan(step, (directions, moments), length=method.steps)
        met = (own >= 0) & (of_labels[own] == codes[:, None]).any(-1)
        recall = met.sum() / jnp.maximum((own >= 0).sum(), 1)
        return after, (directions, recall, tables.sizes(codes).sum(-1).mean())

    carry = (start.directions, optimizer.init(start.directions))
    _, (directions, recall, held) = jax.lax.scan(rebuild, carry, jax.random.split(key, method.rebuilds + 1))
    return TrainedHashes(directions=directions, recall=recall, slots=held)


def negatives(
    method: LSS,
    key: jax.Array,
    tables: LabelTables,
    codes: Int32[Array, "n tables"],
    q: Float[Array, "n d1"],
    own: Int32[Array, "n several"],
    v: Float[Array, "labels d1"],
) -> tuple[Int32[Array, "n negatives"], Float[Array, "n negatives"]]:
    """Labels in the buckets of queries that are not their own, of small logits first, and how much each pair counts.

    A pair counts as if drawn from those of all queries together: as much as its query retrieves, so that the few
    queries that meet huge buckets, where most of the cost lies, are heard. A label is drawn as often as tables hold it
    in the query's bucket: it would have to leave each of them.
    """
    total = tables.sizes(codes).sum(-1, keepdims=True)
    which = jax.random.randint(key, (q.shape[0], 2 * method.negatives), 0, jnp.maximum(total, 1))
    ids = slots(tables, codes, which)
    mined = (total > 0) & ~(ids[..., None] == own[:, None]).any(-1)
    logits = jnp.where(mined, jnp.einsum("nd,nkd->nk", q, v[ids]), jnp.inf)
    order = jnp.argsort(logits, axis=-1)[:, : method.negatives]
    counted = jnp.take_along_axis(mined, order, axis=-1) * total.astype(jnp.float32)
    return jnp.take_along_axis(ids, order, axis=-1), counted


def pair_loss(
    method: LSS,
    directions: Float[Array, "d1 hashes tables"],
    q: Float[Array, "n d1"],
    positives: Float[Array, "n several d1"],
    positive: Array,
    negatives: Float[Array, "n negatives d1"],
    negative: Array,
) -> Float[Array, ""]:
    """The loss of `LSS` on the vectors of queries and labels; `positive` and `negative` say how much pairs count."""

    def bits(x: jax.Array) -> jax.Array:
        unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return jnp.tanh(method.sharpness * jnp.tensordot(unit, directions, 1))

    def mean(loss: jax.Array, counted: jax.Array) -> jax.Array:
        return (loss.mean(-1) * counted).sum() / jnp.maximum(counted.sum(), 1)

    of_query = bits(q)[:, None]
    together = (of_query * bits(positives)).sum(-2) - method.middle
    apart = (of_query * bits(negatives)).sum(-2) - method.middle
    return method.positive_weight * mean(jax.nn.softplus(-together), positive) + mean(jax.nn.softplus(apart), negative)
