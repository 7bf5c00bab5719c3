"""NoMAD: keys as 4-bit codes of a product quantizer, logits as sums of 8-bit table entries instead of products."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Integer, Key, UInt8

from effjax.errors import ConfigError
from effjax.kv.checks import check_whole
from effjax.kv.coding import check_calibration
from effjax.kv.cq import CQ
from effjax.ops.platform import platform_operation
from kernels_cpu import nomad as native
from kernels_cpu._native import NATIVE

ENTRIES, BLOCK, BYTES = 16, 32, 16  # centres of a sub-quantizer; keys of a block; bytes of its codes a sub-quantizer
MOST_SUBS = 257  # sub-quantizers whose sum of bytes fits 16 bits: 257 * 255 = 65,535
_LEAST_SPAN = 1e-30  # of a table; 255 over less would not be finite

Codebooks = Float[Array, "kv_heads subs 16 d_sub"]
Codes = UInt8[Array, "*L kv_heads blocks subs 16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoMAD:
    """Attention without multiply-adds (Zhang et al., NeurIPS 2024, section 3): how keys are coded.

    A key **after rotation**, as a cache holds it, is cut into runs of `d_sub` channels, and each run becomes the index
    of the nearest of 16 centres: `4 / d_sub` bits a channel. A query is multiplied with the centres once; the logit of
    a key is then the sum of one table entry a run, which a processor looks up for 32 keys in one instruction. Values
    and softmax are as usual. Faster on CPUs alone: elsewhere a look-up costs what a product costs.

    Attributes:
        d_sub: channels that share a code: 1, 2 or 4; must divide head_dim.
        iterations: of k-means at most (the authors' program takes 32 to 100).
        fisher: moves every centre to the mean of its members weighted by the Fisher diagonal, number by number.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> method = NoMAD(d_sub=2, iterations=5)
        >>> k = jax.random.normal(jax.random.key(0), (1, 200, 8))
        >>> books = method.learn(k, key=jax.random.key(1))
        >>> codes = encode(k, books)
        >>> books.shape, codes.shape, codes.dtype.name
        ((1, 4, 16, 2), (1, 7, 4, 16), 'uint8')

    Source: Zhang, Yi, Desai and Shrivastava, NoMAD-Attention: Efficient LLM Inference on CPUs Through Multiply-add-free
    Attention (2024); layout and tables as in FAISS's fast scan (André et al., Quicker ADC, 2019).
    """

    d_sub: int = 1
    iterations: int = 50
    fisher: bool = False

    def __post_init__(self) -> None:
        if self.d_sub not in (1, 2, 4):
            raise ConfigError(f"NoMAD: d_sub must be 1, 2 or 4, found {self.d_sub!r}")
        check_whole("NoMAD", "iterations", self.iterations, 0)

    def __str__(self) -> str:
        return f"NoMAD-{self.d_sub}"

    def learn(
        self,
        k: Float[Array, "kv_heads tokens head_dim"],
        grads: Float[Array, "kv_heads tokens head_dim"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Codebooks:
        """Codebooks of one layer, float32.

        Args:
            k: keys of a calibration text after rotation (`effjax.kv.nomad_text.rotated_keys`); the text must reach the
                positions that the codebooks will serve.
            grads: of the loss with respect to them, for `fisher`.
            key: of the draws of k-means++; `jax.random.key(0)` where None.

        Raises:
            ConfigError: `d_sub` does not divide head_dim, there are more than 257 runs, gradients are missing, or
                shapes differ.
        """
        check_calibration(self, k, grads, need_grads=self.fisher)
        check_subs(k.shape[-1], self.d_sub)
        plain = CQ(channels=self.d_sub, bits=4, fisher=False, iterations=self.iterations, table_dtype="float32")
        books = plain.learn(k, key=key)
        return fisher_means(k, grads, books) if self.fisher and grads is not None else books


@jax.jit
def fisher_means(
    k: Float[Array, "kv_heads tokens head_dim"], grads: Float[Array, "kv_heads tokens head_dim"], books: Codebooks
) -> Codebooks:
    """The centres that lose least under the Fisher diagonal while their members stay: `sum g^2 k / sum g^2` each.

    Members are those of `encode`, so that what the weights move is what a code stands for. Steps that weigh the members
    too (`CQ`'s Fisher, or many of these) fit the few tokens that carry most of the gradient.
    """
    heads, subs, entries, d_sub = books.shape

    def runs(x: Array) -> Array:
        return x.astype(jnp.float32).reshape(heads, -1, subs, d_sub).swapaxes(1, 2).reshape(heads * subs, -1, d_sub)

    def one(run: tuple[Array, Array, Array, Array]) -> Array:
        points, slopes, codes, book = run
        # The largest gradient is taken out first: squares of what a loss of thousands of tokens gives may underflow.
        weights = jnp.square(slopes / jnp.maximum(jnp.max(jnp.abs(slopes)), _LEAST_SPAN))
        weights = weights + 1e-3 * jnp.mean(weights)  # no member is nothing
        members = jax.nn.one_hot(codes, entries, axis=0)
        mass = jnp.dot(members, weights, precision="highest")
        sums = jnp.dot(members, weights * points, precision="highest")
        return jnp.where(mass > 0, sums / jnp.where(mass > 0, mass, 1.0), book)

    codes = nearest(k, books).swapaxes(1, 2).reshape(heads * subs, -1)
    return jax.lax.map(one, (runs(k), runs(grads), codes, books.reshape(-1, entries, d_sub))).reshape(books.shape)


def check_subs(head_dim: int, d_sub: int) -> int:
    """The number of sub-quantizers of a head.

    Raises:
        ConfigError: `d_sub` does not divide `head_dim`, or there are more than 257, whose sum would not fit 16 bits.
    """
    if head_dim % d_sub:
        fitting = [d for d in (1, 2, 4) if head_dim % d == 0]
        raise ConfigError(f"NoMAD: d_sub={d_sub} does not divide head_dim {head_dim}; choose one of {fitting}")
    if head_dim // d_sub > MOST_SUBS:
        raise ConfigError(
            f"NoMAD: head_dim {head_dim} with d_sub={d_sub} makes {head_dim // d_sub} sub-quantizers, and sums of 16 "
            f"bits hold {MOST_SUBS}; choose a larger d_sub"
        )
    return head_dim // d_sub


def check_books(head_dim: int, kv_heads: int, books: Any) -> None:
    """Raises ConfigError for codebooks that are not those of these heads."""
    if books.ndim != 4 or books.shape[-1] not in (1, 2, 4):
        raise ConfigError(f"NoMAD: codebooks have shape {list(books.shape)}, not [kv_heads, subs, 16, d_sub]")
    wanted = [kv_heads, check_subs(head_dim, books.shape[-1]), ENTRIES, books.shape[-1]]
    if list(books.shape) != wanted:
        raise ConfigError(
            f"NoMAD: {kv_heads} key heads of {head_dim} channels need codebooks {wanted}, found {list(books.shape)}; "
            "learn them with NoMAD.learn on this layer"
        )


# ---- codes -----------------------------------------------------------------------------------------------------------


def encode(k: Float[Array, "*L kv_heads slots head_dim"], books: Codebooks) -> Codes:
    """Codes of keys after rotation in blocks of 32; what is missing in the last block is coded as 0.

    Raises:
        ConfigError: the codebooks are others'.
    """
    check_books(k.shape[-1], k.shape[-3], books)
    return to_blocks(nearest(k, books))


def decode(codes: Codes, books: Codebooks) -> Float[Array, "*L kv_heads slots head_dim"]:
    """The centres that codes stand for, float32, `32 * blocks` slots."""
    index = from_blocks(codes)[..., None, None].astype(jnp.int32)  # [*L, kv_heads, slots, subs, 1, 1]
    entries = jnp.expand_dims(books.astype(jnp.float32), (*range(codes.ndim - 4), -4))
    found = jnp.take_along_axis(entries, index, axis=-2)[..., 0, :]
    return found.reshape(*found.shape[:-2], -1)


def nearest(k: Float[Array, "*L kv_heads slots head_dim"], books: Codebooks) -> UInt8[Array, "*L kv_heads slots subs"]:
    """The first of the nearest centres of every run, by squared differences in float32."""
    subs, d_sub = books.shape[1], books.shape[3]
    k = k.astype(jnp.float32).reshape(*k.shape[:-1], subs, d_sub)
    books = jnp.expand_dims(books.astype(jnp.float32), (*range(k.ndim - 4), -4))  # [.., kv_heads, 1, subs, 16, d_sub]
    best = jnp.full(k.shape[:-1], jnp.inf, jnp.float32)
    code = jnp.zeros(k.shape[:-1], jnp.uint8)
    # A running minimum is one loop over the keys; an argmin over distances would write all 16 of them.
    for entry in range(ENTRIES):
        away = sum(jnp.square(k[..., i] - books[..., entry, i]) for i in range(d_sub))
        code = jnp.where(away < best, jnp.uint8(entry), code)
        best = jnp.minimum(away, best)
    return code


def to_blocks(codes: Integer[Array, "*L slots subs"]) -> UInt8[Array, "*L blocks subs 16"]:
    """The transposed layout: 16 bytes a sub-quantizer, low nibbles the first 16 keys, high nibbles the others.

    Example:
        >>> to_blocks(jnp.arange(32)[:, None] % 16)[0, 0, :3].tolist()
        [0, 17, 34]
    """
    *lead, slots, subs = codes.shape
    whole = jnp.pad(codes.astype(jnp.uint8), [(0, 0)] * len(lead) + [(0, -slots % BLOCK), (0, 0)])
    halves = whole.reshape(*lead, -1, 2, BYTES, subs)
    return (halves[..., 0, :, :] | halves[..., 1, :, :] << 4).swapaxes(-1, -2)


def from_blocks(blocks: UInt8[Array, "*L blocks subs 16"]) -> UInt8[Array, "*L slots subs"]:
    """Codes of `32 * blocks` keys: the inverse of `to_blocks`."""
    halves = jnp.stack([blocks & 15, blocks >> 4], axis=-3).swapaxes(-1, -2)  # [*L, blocks, 2, 16, subs]
    *lead, number, _, _, subs = halves.shape
    return halves.reshape(*lead, number * BLOCK, subs)


# ---- queries ---------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryTable:
    """What queries look up: `logit = sum_s table[s, code_s] / scale + bias`.

    Attributes:
        table: uint8 `[*L, kv_heads, group, subs, 16]`.
        scale: float32 `[*L, kv_heads, group]`, shared by all runs, so that entries add up as integers.
        bias: float32 `[*L, kv_heads, group]`, the sum of what each run's entries are counted from.
    """

    table: Any
    scale: Any
    bias: Any


def query_table(q: Float[Array, "*L kv_heads group head_dim"], books: Codebooks) -> QueryTable:
    """Products of queries with all centres, in 8 bits of the largest range that a run has.

    Raises:
        ConfigError: the codebooks are others'.

    Example:
        >>> books = jnp.zeros((1, 2, 16, 1)).at[0, :, 1, 0].set(1.0)
        >>> found = query_table(jnp.array([[[3.0, 1.0]]]), books)
        >>> found.table[0, 0, :, 1].tolist(), found.scale.tolist()
        ([255, 85], [[85.0]])

    Source: Zhang et al. 2024, section 3.2.
    """
    products = query_products(q, books)
    low = jnp.min(products, axis=-1, keepdims=True)
    span = jnp.max(jnp.max(products, axis=-1) - low[..., 0], axis=-1)
    scale = jnp.where(span > _LEAST_SPAN, 255 / jnp.where(span > _LEAST_SPAN, span, 1.0), 1.0)
    table = jnp.round((products - low) * scale[..., None, None])
    return QueryTable(table=table.astype(jnp.uint8), scale=scale, bias=jnp.sum(low[..., 0], axis=-1))


def query_products(
    q: Float[Array, "*L kv_heads group head_dim"], books: Codebooks
) -> Float[Array, "*L kv_heads group subs 16"]:
    """The table before it is brought to 8 bits, float32.

    Raises:
        ConfigError: the codebooks are others'.
    """
    check_books(q.shape[-1], q.shape[-3], books)
    runs = q.astype(jnp.float32).reshape(*q.shape[:-1], *books.shape[1::2])
    wide = jnp.expand_dims(books.astype(jnp.float32), (*range(q.ndim - 3), -4))  # [.., kv_heads, 1, subs, 16, d_sub]
    return sum((runs[..., i : i + 1] * wide[..., i] for i in range(books.shape[-1])), jnp.float32(0))


def lookup_sums(
    table: UInt8[Array, "*L kv_heads group subs 16"], codes: Codes
) -> Int32[Array, "*L kv_heads group slots"]:
    """The sums of table entries that codes name, exact: at most 255 times the number of sub-quantizers.

    Raises:
        ConfigError: tables and codes do not fit together, or there are more than 257 sub-quantizers.
    """
    check_tables(table, codes)
    index = from_blocks(codes).swapaxes(-1, -2)  # [*L, kv_heads, subs, slots]
    index = jnp.expand_dims(index.astype(jnp.int32), -3)
    return jnp.sum(jnp.take_along_axis(table, index, axis=-1), axis=-2, dtype=jnp.int32)


def lookup_logits(tables: QueryTable, codes: Codes) -> Float[Array, "*L kv_heads group slots"]:
    """Products of queries with coded keys, float32, `32 * blocks` slots.

    On one CPU device the native look-up loop (`kernels_cpu`), elsewhere plain jnp; the sums of both are the same
    integers. Not differentiable.

    Raises:
        ConfigError: tables and codes do not fit together, or there are more than 257 sub-quantizers.
    """
    check_tables(tables.table, codes)
    return _lookup(tables.table, tables.scale, tables.bias, codes)


def check_tables(table: Any, codes: Any) -> None:
    """Raises ConfigError for tables and codes that do not fit together."""
    wanted = (*codes.shape[:-3], table.shape[-3], codes.shape[-2], ENTRIES)
    if codes.shape[-1] != BYTES or table.shape != wanted:
        raise ConfigError(
            f"NoMAD: codes {list(codes.shape)} need tables {list(wanted)}, found {list(table.shape)}; codes are "
            "[*L, kv_heads, blocks, subs, 16], tables [*L, kv_heads, group, subs, 16]"
        )
    check_subs(codes.shape[-2], 1)


def _lookup_shape(table: Any, scale: Any, bias: Any, codes: Any) -> Any:
    del scale, bias
    return (*table.shape[:-2], codes.shape[-3] * BLOCK), jnp.float32


def _lookup_reference(table: Array, scale: Array, bias: Array, codes: Array) -> Array:
    return lookup_sums(table, codes).astype(jnp.float32) / scale[..., None] + bias[..., None]


def _lookup_cpu(table: Array, scale: Array, bias: Array, codes: Array) -> Array:
    if NATIVE.load() is None:
        NATIVE.warn_once("nomad.lookup_logits")
        return _lookup_reference(table, scale, bias, codes)
    return native.lookup_logits(table, scale, bias, codes)


_lookup = platform_operation("nomad_lookup", _lookup_shape, _lookup_reference, {"cpu": _lookup_cpu}, ())
