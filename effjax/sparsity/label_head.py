"""A wide output layer that scores only the labels in a query's hash buckets, at inference and in training."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from effjax.hashing.lsh import SignProjections
from effjax.ops.label_top_k import LabelTopK, label_top_k
from effjax.sparsity.label_tables import LabelTables, build_tables, retrieve, same_norm, with_last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LabelHead:
    """The last dense layer of a classifier, and tables of its labels: replaces the layer at inference.

    A head of learned hashes is LSS; of random ones it is the layer of SLIDE, or plain MIPS-LSH (`build_label_head`).

    Attributes:
        weights: `[labels, d]`, a row a label, float32 or bfloat16.
        bias: `float32[labels]`.
        hash_functions: of queries `[h, 1]`.
        tables: of the labels.
        fallback: `int32[few]`, labels that are scored too where fewer than the wanted are retrieved.
    """

    weights: Shaped[Array, "labels d"]
    bias: Float[Array, "labels"]
    hash_functions: SignProjections
    tables: LabelTables
    fallback: Int32[Array, "few"]

    def codes(self, h: Float[Array, "*batch d"]) -> Int32[Array, "*batch tables"]:
        """The bucket of each table that the queries read."""
        return self.hash_functions(with_last(h, jnp.ones(h.shape[:-1])))

    def top_k(self, h: Float[Array, "*batch d"], *, k: int, implementation: str | None = None) -> LabelTopK:
        """The `k` best labels among those retrieved, and how many were scored; see `effjax.ops.label_top_k`."""
        return label_top_k(
            h,
            self.hash_functions,
            self.tables.ids,
            self.tables.offsets,
            self.weights,
            self.bias,
            self.fallback,
            k=k,
            implementation=implementation,
        )

    def retrieve(
        self, h: Float[Array, "*batch d"], *, max_candidates: int
    ) -> tuple[Int32[Array, "*batch candidates"], Bool[Array, "*batch candidates"]]:
        """Padded labels of the buckets of `h`, without the fallback; see `effjax.sparsity.retrieve`."""
        return retrieve(self.tables, self.codes(h), max_candidates=max_candidates)

    def logits(
        self, h: Float[Array, "*batch d"], ids: Int32[Array, "*batch n"], valid: Bool[Array, "*batch n"]
    ) -> Float[Array, "*batch n"]:
        """Of these labels in float32, -inf where not `valid`; differentiable."""
        return sampled_logits(self.weights, self.bias, h, ids, valid)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self))


def build_label_head(
    kernel: Float[Array, "d labels"],
    bias: Float[Array, "labels"] | None,
    hash_functions: SignProjections,
    *,
    fallback: Sequence[int] | Int32[Array, "few"] = (),
    dtype: str = "float32",
) -> LabelHead:
    """Hashes the labels of a dense layer into tables.

    Args:
        kernel, bias: of the layer, as Flax has them.
        hash_functions: without rehashing. Of `d + 1` channels, both sides are hashed as they are, `[w, b]` and
            `[h, 1]`: learned (`train_hashes`) this is LSS, random (`SignProjections.make`) it is SLIDE's SimHash
            (Chen et al., arXiv 1903.03129). Of `d + 2` channels, labels get one that makes their norms equal and
            queries a zero there: plain MIPS-LSH.
        fallback: labels to score where fewer than wanted are retrieved, such as `frequent_labels`.
        dtype: of the stored rows, "float32" or "bfloat16".

    Raises:
        ValueError: shapes that do not fit together, hash functions that rehash, or another dtype.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (16, 500))
        >>> lsh = SignProjections.make(jax.random.key(1), dim=17, rows=4, hashes=5)
        >>> head = build_label_head(kernel, jnp.zeros(500), lsh, fallback=[0, 1])
        >>> best = head.top_k(kernel.T[:3], k=1)  # queries like labels 0, 1 and 2
        >>> best.labels[:, 0].tolist(), bool(best.scored.max() < 250)
        ([0, 1, 2], True)
    """
    if kernel.ndim != 2 or (bias is not None and bias.shape != kernel.shape[1:]):
        raise ValueError(
            f"build_label_head: kernel {kernel.shape} and bias {None if bias is None else bias.shape}: give a dense "
            "layer's [d, labels] and [labels]"
        )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"build_label_head: dtype={dtype!r}: choose 'float32' or 'bfloat16'")
    d, labels = kernel.shape
    dim = hash_functions.directions.shape[0]
    if dim not in (d + 1, d + 2) or hash_functions.rehash is not None:
        raise ValueError(
            f"build_label_head: hash functions of {dim} channels, rehashed: {hash_functions.rehash is not None}: make "
            f"SignProjections with dim={d + 1} (dim={d + 2} for plain MIPS-LSH) and without buckets"
        )
    bias = jnp.zeros(labels) if bias is None else bias.astype(jnp.float32)
    points = with_last(kernel.T, bias)
    codes = hash_functions(points if dim == d + 1 else same_norm(points))
    return LabelHead(
        weights=kernel.T.astype(dtype),
        bias=bias,
        hash_functions=dataclasses.replace(hash_functions, directions=hash_functions.directions[: d + 1]),
        tables=build_tables(codes, hash_functions.buckets),
        fallback=jnp.asarray(fallback, jnp.int32).reshape(-1),
    )


def frequent_labels(labels: Int32[Array, "*n"], *, of: int, count: int) -> Int32[Array, "count"]:
    """The `count` labels of `of` that occur most often, negative ones being padding.

    Example:
        >>> frequent_labels(jnp.array([[3, 1], [3, -1]]), of=5, count=2).tolist()
        [3, 1]
    """
    flat = labels.reshape(-1)
    times = jnp.zeros(of, jnp.int32).at[jnp.where(flat < 0, of, flat)].add(1, mode="drop")
    return jax.lax.top_k(times, count)[1].astype(jnp.int32)


def sampled_logits(
    weights: Float[Array, "labels d"],
    bias: Float[Array, "labels"],
    h: Float[Array, "*batch d"],
    ids: Int32[Array, "*batch n"],
    valid: Bool[Array, "*batch n"],
) -> Float[Array, "*batch n"]:
    """`h @ weights[id] + bias[id]` in float32, -inf where not `valid`."""
    at = jnp.where(valid, ids, 0)
    products = jnp.einsum("...d,...nd->...n", h.astype(jnp.float32), weights[at].astype(jnp.float32))
    return jnp.where(valid, products + bias[at].astype(jnp.float32), -jnp.inf)


def sampled_softmax_loss(
    kernel: Float[Array, "d labels"],
    bias: Float[Array, "labels"],
    h: Float[Array, "batch d"],
    labels: Int32[Array, "batch *several"],
    ids: Int32[Array, "batch n"],
    valid: Bool[Array, "batch n"],
) -> Float[Array, "batch"]:
    """Cross entropy over a query's own labels and those retrieved for it: what trains a wide layer at the same cost.

    Retrieved labels are its hardest competitors, no random sample of all, so that no logit is corrected for how often
    its label is drawn (as in SLIDE). With all labels retrieved it is the cross entropy of the whole layer.

    Args:
        kernel, bias: of the dense layer, as Flax has them; only columns of the labels in question get a gradient.
        h: queries.
        labels: one a query, or several padded with -1, whose losses are averaged; 0 where there is none.
        ids, valid: from `LabelHead.retrieve`, which need not be of the very same weights.

    Returns:
        float32 `[batch]`.

    Raises:
        ValueError: labels or ids of another batch.

    Example:
        >>> kernel, h = jax.random.normal(jax.random.key(0), (4, 9)), jnp.ones((1, 4))
        >>> args = (kernel, jnp.zeros(9), h, jnp.array([2]), jnp.arange(9)[None], jnp.ones((1, 9), bool))
        >>> bool(abs(sampled_softmax_loss(*args)[0] + jax.nn.log_softmax(h @ kernel)[0, 2]) < 1e-5)
        True
    """
    own = labels[:, None] if labels.ndim == 1 else labels
    if own.shape[0] != h.shape[0] or ids.shape != valid.shape or ids.shape[0] != h.shape[0]:
        raise ValueError(
            f"sampled_softmax_loss: h {h.shape}, labels {labels.shape}, ids {ids.shape} and valid {valid.shape}: give "
            "a row a query in each"
        )
    others = valid & ~(ids[:, :, None] == own[:, None, :]).any(-1)
    at, held = jnp.concatenate([own, ids], 1), jnp.concatenate([own >= 0, others], 1)
    logits = sampled_logits(kernel.T, bias, h, at, held)
    logits = jnp.where(held, logits, jnp.finfo(jnp.float32).min)  # finite, so that a query without labels has no NaN
    nll = jax.nn.logsumexp(logits, -1, keepdims=True) - logits[:, : own.shape[1]]
    real = own >= 0
    return jnp.where(real, nll, 0).sum(-1) / jnp.maximum(real.sum(-1), 1)
