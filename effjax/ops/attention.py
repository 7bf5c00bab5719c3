"""Attention of one new query a row to the slots of a key-value cache, dense, coded or in pages."""

import importlib
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.ops import dispatch
from effjax.ops.attention_blocks import Question, Slots, blocked, reference, slots_shape
from effjax.ops.coded_slots import CodedSlots
from effjax.ops.platform import platform_operation

Implementation = Literal["reference", "blocked", "either", "cpu", "tpu", "gpu"]
PLAIN, KERNELS = ("reference", "blocked", "either"), ("cpu", "tpu", "gpu")
_TILE_BYTES = 2**18  # of a block of keys and values, decoded: they stay in the second-level cache of a processor
_LEAST_BLOCK = 64
# Measured with two threads of Zen 4: float32 slots go by blocks at half the speed of all at once, which reads more.
_SHORT = 3 / 8
_WORTH_BLOCKS = 512


@partial(jax.jit, static_argnames=("importance", "scale", "implementation"))
def decode_attention(
    q: Float[Array, "batch kv_heads group head_dim"],
    k: Slots,
    v: Slots,
    length: Int[Array, "batch kv_heads"],
    *,
    start: Int[Array, "batch kv_heads"] | None = None,
    asked: Float[Array, " batch"] | None = None,
    importance: Any = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads slots"] | None]:
    """Softmax attention of one query a row to the filled slots of its cache, and what each slot receives of it.

    Implementations but the reference read only what lies between `start` and `length`, and decode codes on the way:
    dense keys and values of a whole coded cache are never in memory.

    Args:
        q: queries, the heads that share a key head side by side; float32, bfloat16 or float16.
        k: keys, `[batch, kv_heads, slots, head_dim]`, as they are to be multiplied (rotated); or a `CodedSlots`.
        v: values, like `k`; keys and values may be held differently.
        length: filled slots of every row and head; 0 gives zeros. What unfilled slots hold must be finite.
        start: the first slot that is seen, for sliding windows; 0 where None.
        asked: what the query of each row counts in the sums of `received`; None leaves them out.
        importance: an `effjax.kv.Importance`; where it counts pivotal slots, sums are of what each of them counts and
            0 for the others, in place of weights.
        scale: of the logits; `head_dim ** -0.5` where None.
        implementation: "reference" takes all slots at once; "blocked" goes block by block, as far as the longest row
            reaches; "either" finds out when it runs which of the two reads less; "cpu", "tpu" and "gpu" name kernels of
            `kernels_cpu` and `kernels_pallas`. None chooses for the platform that the program is compiled for, and on
            more than one device the reference, which XLA can partition.

    Returns:
        `(y, received)`: outputs in the dtype of `q`, and float32 sums of the attention weights over the query heads of
        a group, times `asked`, 0 where a slot is not seen; None if nothing was asked. Only a named "reference" can be
        differentiated.

    Raises:
        ConfigError: shapes or dtypes do not fit, or a named implementation does not take them; the message says why.

    Example:
        >>> q, k = jnp.ones((1, 2, 4, 16)), jnp.ones((1, 2, 8, 16))
        >>> y, received = decode_attention(q, k, 3 * k, jnp.array([[2, 8]]), asked=jnp.ones(1))
        >>> y.shape, float(y[0, 0, 0, 0]), received[0, 0].tolist()
        ((1, 2, 4, 16), 3.0, [2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])

    Source: Pope et al., Efficiently scaling transformer inference (2022), on what a step of decoding reads; blocks of
    slots that are combined afterwards as in flash-decoding (Dao et al. 2023).
    """
    question = make_question("decode_attention", q, k, v, length, start, asked, None, scale, importance)
    return _answer("decode_attention", question, implementation)


@partial(jax.jit, static_argnames=("scale", "implementation"))
def paged_decode_attention(
    q: Float[Array, "batch kv_heads group head_dim"],
    k_pages: Slots,
    v_pages: Slots,
    page_table: Int[Array, "batch pages_per_row"],
    length: Int[Array, " batch"],
    *,
    start: Int[Array, " batch"] | None = None,
    asked: Float[Array, " batch"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads slots"] | None]:
    """`decode_attention` to a cache in pages that rows may share, as in Kwon et al., PagedAttention (2023).

    Args:
        q: as in `decode_attention`.
        k_pages: keys, `[num_pages, kv_heads, page_size, head_dim]`, or a `CodedSlots` of that shape.
        v_pages: values, like `k_pages`.
        page_table: int32, the page that holds slots `i * page_size` and on of a row, for every `i`. What stands behind
            the last page that a row needs does not matter.
        length: slots of every row, at most `pages_per_row * page_size`.
        start, asked, scale, implementation: as in `decode_attention`, `start` one a row.

    Returns:
        `(y, received)` as from `decode_attention`, with `pages_per_row * page_size` slots.

    Raises:
        ConfigError: shapes or dtypes do not fit, or a named implementation does not take them.

    Example:
        >>> pages = jnp.ones((5, 2, 8, 16))
        >>> table = jnp.array([[4, 0], [2, 0]])
        >>> y, _ = paged_decode_attention(jnp.ones((2, 2, 1, 16)), pages, pages, table, jnp.array([11, 3]))
        >>> y.shape
        (2, 2, 1, 16)
    """
    heads = (q.shape[0], q.shape[1])
    if getattr(page_table, "ndim", 0) != 2 or page_table.shape[0] != q.shape[0]:
        raise ConfigError(f"paged_decode_attention: page_table must be [{q.shape[0]}, pages], found {page_table.shape}")
    if length.shape != heads[:1]:
        raise ConfigError(f"paged_decode_attention: length must be [{q.shape[0]}], found {list(length.shape)}")
    length = jnp.broadcast_to(length[:, None], heads)
    start = None if start is None else jnp.broadcast_to(start[:, None], heads)
    question = make_question("paged_decode_attention", q, k_pages, v_pages, length, start, asked, page_table, scale)
    return _answer("paged_decode_attention", question, implementation)


def choose(platform: str, a: Question) -> Implementation:
    """The implementation for a program on one device of a platform ("cpu", "tpu" or "cuda").

    Kernels where they take the operands and are fit for them (GPUs must be Hopper). Without one, codes go block by
    block, and on a CPU so do pages, and dense slots in float32 while few of many are filled.
    """
    names: dict[str, Implementation] = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu"}
    name = names[platform]
    if not why_not(name, a) and (name == "cpu" or not _kernel(name).unfit(a)):
        return name
    coded = isinstance(a.k, CodedSlots) or isinstance(a.v, CodedSlots)
    if coded or (name == "cpu" and a.table is not None):  # a page at a time stays in the cache of a processor
        return "blocked"
    single = a.k.dtype == a.v.dtype == jnp.float32  # XLA's CPU compiler has no fast product of blocks in 16 bits
    return "either" if name == "cpu" and single and a.slots >= _WORTH_BLOCKS else "reference"


def why_not(implementation: str, a: Question) -> str:
    """Why an implementation does not take these operands, with the remedy; empty where it does."""
    return _kernel(implementation).why_not(a) if implementation in KERNELS else ""


def _kernel(name: str) -> ModuleType:
    return importlib.import_module(
        "kernels_cpu.decode_attention" if name == "cpu" else f"kernels_pallas.decode_attention.{name}"
    )


def make_question(
    where: str,
    q: Any,
    k: Any,
    v: Any,
    length: Any,
    start: Any,
    asked: Any,
    table: Any,
    scale: float | None,
    importance: Any = None,
) -> Question:
    if q.ndim != 4:
        raise ConfigError(f"{where}: q must be [batch, kv_heads, group, head_dim], found {list(q.shape)}")
    batch, heads, _, head_dim = q.shape
    lead = "batch" if table is None else "num_pages"
    for name, x in (("k", k), ("v", v)):
        if isinstance(x, CodedSlots):
            x.checked(name)
        shape = slots_shape(x)
        fits = len(shape) == 4 and shape[1] == heads and shape[3] == head_dim and shape[2] > 0
        if not fits or (table is None and shape[0] != batch):
            first = batch if table is None else lead
            wanted = f"[{first}, {heads}, slots, {head_dim}]"
            raise ConfigError(f"{where}: {name} must be {wanted} for q {list(q.shape)}, found {list(shape)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigError(f"{where}: {name} holds {x.dtype}; codes go with their coder, as a CodedSlots")
    if slots_shape(k)[:3] != slots_shape(v)[:3]:
        raise ConfigError(f"{where}: k and v hold different slots, {list(slots_shape(k))} and {list(slots_shape(v))}")
    for name, x in (("length", length), ("start", start)):
        if x is not None and (x.shape != (batch, heads) or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ConfigError(f"{where}: {name} must be int32 [{batch}, {heads}], found {x.dtype} {list(x.shape)}")
    if asked is not None and asked.shape != (batch,):
        raise ConfigError(f"{where}: asked must be [{batch}], one number a row, found {list(asked.shape)}")
    if scale is not None and not math.isfinite(scale):
        raise ConfigError(f"{where}: scale must be a finite number, found {scale!r}")
    slots = slots_shape(k)[2] * (1 if table is None else table.shape[1])
    return Question(
        q=q,
        k=k,
        v=v,
        start=jnp.zeros((batch, heads), jnp.int32) if start is None else jnp.clip(start, 0, slots).astype(jnp.int32),
        length=jnp.clip(length, 0, slots).astype(jnp.int32),
        asked=None if asked is None else asked.astype(jnp.float32),
        table=None if table is None else table.astype(jnp.int32),
        scale=head_dim**-0.5 if scale is None else float(scale),
        counts=importance if importance is not None and importance.counts_pivotal else None,
    )


def _answer(where: str, a: Question, implementation: str | None) -> tuple[Array, Array | None]:
    if implementation is None:
        leaves, treedef = jax.tree.flatten(a)
        found = _chosen(*leaves, treedef=treedef)
    elif implementation not in (*PLAIN, *KERNELS):
        raise ConfigError(f"{where}: no implementation {implementation!r}; there are {', '.join((*PLAIN, *KERNELS))}")
    else:
        if reason := why_not(implementation, a):
            raise ConfigError(f"{where}: implementation={implementation!r} does not take this: {reason}")
        found = _run(implementation, a)
    return found[0], None if a.asked is None else found[1]


def _run(name: str, a: Question) -> tuple[Array, Array | None]:
    if name == "reference":
        return reference(a)
    if name == "blocked":
        return blocked(a, block_slots(a))
    if name == "either":
        span = jnp.max(a.length) - jnp.min(a.start)
        return jax.lax.cond(span <= int(_SHORT * a.slots), lambda a: blocked(a, block_slots(a)), reference, a)
    return _kernel(name).decode_attention(a)


def block_slots(a: Question) -> int:
    """Slots of a block: a power of two whose keys and values, of all rows and heads, fit the cache of a processor."""
    batch, heads, _, head_dim = a.q.shape
    fitting = _TILE_BYTES // (batch * heads * head_dim * 2 * a.k.dtype.itemsize)
    return max(_LEAST_BLOCK, 1 << max(fitting, 1).bit_length() - 1)


def _outputs(a: tuple[Array, Array | None]) -> list[Array]:
    return [x for x in a if x is not None]


def _chosen_shape(*leaves: Any, treedef: Any) -> list[tuple[tuple[int, ...], Any]]:
    a = treedef.unflatten(leaves)
    y = (tuple(a.q.shape), a.q.dtype)
    return [y] if a.asked is None else [y, ((*a.q.shape[:2], a.slots), jnp.float32)]


def _chosen_on(platform: str) -> Callable[..., list[Array]]:
    def run(*leaves: Array, treedef: Any) -> list[Array]:
        a = treedef.unflatten(leaves)
        return _outputs(_run(choose(platform, a), a))

    return run


def _partitioned(*leaves: Array, treedef: Any) -> list[Array]:
    return _outputs(reference(treedef.unflatten(leaves)))


_chosen = platform_operation(
    "decode_attention",
    _chosen_shape,
    default=_partitioned,
    one_device={platform: _chosen_on(platform) for platform in dispatch.PLATFORMS},
    static_argnames=("treedef",),
)
