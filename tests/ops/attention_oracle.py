"""Attention of one query a row in float64 numpy, head by head, and random caches with ragged lengths for it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.kv.coding import Coder
from effjax.kv.cq import CQ
from effjax.kv.integer import PerChannel, PerToken
from effjax.ops import CodedSlots, decode_attention, paged_decode_attention


@dataclasses.dataclass
class Case:
    """Operands of `decode_attention` (or, with a table, of `paged_decode_attention`) and what they hold in float64."""

    q: Any
    k: Any
    v: Any
    start: Any
    length: Any
    asked: Any
    keys: np.ndarray
    values: np.ndarray
    table: Any = None
    importance: Any = None

    def answer(self, implementation=None, asked=True, **options):
        how = dict(start=self.start, asked=self.asked if asked else None, implementation=implementation, **options)
        if self.table is None:
            how["importance"] = self.importance
            return decode_attention(self.q, self.k, self.v, self.length, **how)
        how["start"] = self.start[:, 0]
        return paged_decode_attention(self.q, self.k, self.v, self.table, self.length[:, 0], **how)


def exact(case, scale=None):
    q, asked = np.asarray(case.q, np.float64), np.asarray(case.asked, np.float64)
    batch, heads, group, head_dim = q.shape
    slots = case.keys.shape[2]
    y, received = np.zeros(q.shape), np.zeros((batch, heads, slots))
    for b, h, g in np.ndindex(batch, heads, group):
        seen = slice(int(case.start[b, h]), int(case.length[b, h]))
        logits = case.keys[b, h, seen] @ q[b, h, g] * (head_dim**-0.5 if scale is None else scale)
        if logits.size == 0:
            continue
        powers = np.exp(logits - logits.max())
        weights = powers / powers.sum()
        y[b, h, g] = weights @ case.values[b, h, seen]
        received[b, h, seen] += asked[b] * _given(case.importance, weights)
    return y, received


def _given(importance, weights):
    """What a query of these weights gives to the slots that it sees."""
    if importance is None:
        return weights
    if importance.quantile is not None:
        pivotal = weights > np.quantile(weights, importance.quantile)
    else:
        pivotal = weights > importance.multiple / len(weights)
    return pivotal * (weights.max() if importance.peaked else 1.0)


def random_case(
    batch=2, heads=2, group=4, slots=150, head_dim=16, *, dtype="float32", keys="dense", values="dense", window=False,
    page=None, seed=0
):  # fmt: skip
    """Ragged lengths, an empty one and a full one first; pages lie in no order, with one to spare."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((batch, heads, group, head_dim)), dtype)
    table = None
    shape = (batch, heads, slots, head_dim)
    if page is not None:
        pages = slots // page
        table = rng.permutation(batch * pages + 1)[: batch * pages].reshape(batch, pages)
        shape = (batch * pages + 1, heads, page, head_dim)
    k, exact_k = _held(keys, rng.standard_normal(shape) * np.linspace(0.5, 2, head_dim), dtype)
    v, exact_v = _held(values, rng.standard_normal(shape) + 0.5, dtype)
    lengths = np.array([0, slots, 1, *rng.integers(0, slots + 1, batch * heads)])
    if table is None:
        lengths = lengths[: batch * heads].reshape(batch, heads)
    else:
        lengths = np.repeat(lengths[:batch, None], heads, axis=1)
        exact_k, exact_v = (x[table].swapaxes(1, 2).reshape(batch, heads, slots, head_dim) for x in (exact_k, exact_v))
        needed = -(-lengths[:, :1] // page)
        table = jnp.asarray(np.where(np.arange(table.shape[1]) < needed, table, -7), jnp.int32)
    return Case(
        q=q,
        k=k,
        v=v,
        start=jnp.asarray(np.maximum(lengths - slots // 3, 0) if window else 0 * lengths, jnp.int32),
        length=jnp.asarray(lengths, jnp.int32),
        asked=jnp.asarray(rng.uniform(0, 2, batch), jnp.float32),
        keys=exact_k,
        values=exact_v,
        table=table,
    )


def _held(kind, x, dtype):
    """Vectors as a cache holds them, and what that is in float64."""
    if kind == "dense":
        x = jnp.asarray(x, dtype)
        return x, np.asarray(x, np.float64)
    name, bits = kind.split("-")[0], int(kind[-1])
    head_dim = x.shape[-1]
    sample = jnp.asarray(x[0], jnp.float32)
    if name == "cq":
        coding = CQ(channels=int(kind.split("-")[1]), bits=bits, fisher=False, iterations=0)
        tables = jnp.asarray(
            np.random.default_rng(3).standard_normal(
                (x.shape[1], head_dim // coding.channels, 2**bits, coding.channels)
            ),
            jnp.float16,
        )
    else:
        coding = PerChannel(bits=bits) if name == "channel" else PerToken(bits=bits, head_dim=head_dim)
        tables = coding.learn(sample)
    coder = Coder(coding=coding, tables=tables)
    coded = jax.jit(coder.encode)(jnp.asarray(x, jnp.float32))
    return CodedSlots(coded=coded, coder=coder), np.asarray(coder.decode(coded), np.float64)


def largest_error(case, answer, scale=None):
    """Of outputs relative to the largest one, and of the sums of weights likewise; what is not seen must be 0."""
    y, received = exact(case, scale)
    assert answer[0].dtype == case.q.dtype and answer[0].shape == y.shape
    error = np.abs(np.asarray(answer[0], np.float64) - y).max() / max(np.abs(y).max(), 1e-9)
    if answer[1] is None:
        return float(error)
    assert answer[1].dtype == jnp.float32 and answer[1].shape == received.shape
    found = np.asarray(answer[1], np.float64)
    slot = np.arange(found.shape[2])
    seen = (slot >= np.asarray(case.start)[..., None]) & (slot < np.asarray(case.length)[..., None])
    assert not found[~seen].any()
    return float(max(error, np.abs(found - received).max() / max(np.abs(received).max(), 1e-9)))


def assert_answers(case, answer, tolerance, scale=None):
    error = largest_error(case, answer, scale)
    assert error <= tolerance, f"off by {error:.2e} of the largest"
