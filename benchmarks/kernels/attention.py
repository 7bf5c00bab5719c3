"""Attention of one query a row to its cache on the device that there is: bytes of live slots over time, as bandwidth.

    python -m benchmarks.kernels.attention            a decoder's cache, dense, coded and in pages
    python -m benchmarks.kernels.attention --smoke    small ones, to see that it runs

Each case has several caches, more bytes than a cache of the processor holds, and one program goes through them one
after the other, as a decoder goes through its layers. The sides take turns, and the least time of each counts. "At
once" is the attention of `effjax.models` to all slots, decoded beforehand where they are coded. Bytes are those of the
slots that are filled, and the limit is a copy on the device (on a CPU the STREAM triad).
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.kernels.gpu import copy_bandwidth
from benchmarks.kernels.stream import triad
from effjax.arrays import nbytes
from effjax.kv.coding import Coder
from effjax.kv.cq import CQ
from effjax.kv.integer import PerChannel, PerToken
from effjax.models.attention import attend_to_slots
from effjax.ops import CodedSlots, decode_attention, paged_decode_attention
from kernels_pallas.shapes import MODELS

CACHES_BYTES = 2**28  # that a program goes through at least, unless they are small
FILLED = {"full": (1.0, 1.0), "a quarter": (0.25, 0.25), "ragged": (0.0, 1.0)}  # of the slots, the rows between


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One form of a cache; `page` is 0 where it is not in pages."""

    name: str
    keys: Any = None
    values: Any = None
    page: int = 0


def cases(head_dim: int) -> tuple[Case, ...]:
    cq = CQ(channels=8, bits=8)
    return (
        Case(name="dense"),
        Case(name="int8", keys=PerChannel(bits=8), values=PerToken(bits=8, head_dim=head_dim)),
        Case(name="int4", keys=PerChannel(bits=4), values=PerToken(bits=4, head_dim=head_dim)),
        Case(name="CQ-8c8b", keys=cq, values=cq),
        Case(name="pages of 16", page=16),
        Case(name="pages of 128", page=128),
    )


def held(coding: Any, x: jax.Array) -> Any:
    """The same vectors under a coding; tables are not learned, as what they hold does not change the time."""
    if coding is None:
        return x
    _, heads, _, head_dim = x.shape
    if isinstance(coding, CQ):
        tables = jax.random.normal(
            jax.random.key(0), (heads, head_dim // coding.channels, 2**coding.bits, coding.channels)
        )
        tables = tables.astype(jnp.float16)
    else:
        tables = coding.learn(x[0, :, :256].astype(jnp.float32))
    coder = Coder(coding=coding, tables=tables)
    return CodedSlots(coded=jax.jit(coder.encode)(x), coder=coder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Least seconds of one attention of either side, and the live bytes that it has to read."""

    ours: float
    at_once: float
    live: float


def measure(
    case: Case, shape: tuple[int, ...], group: int, dtype: Any, filled: tuple[float, float], repeats: int
) -> Timed:
    batch, heads, slots, head_dim = shape
    q = jax.random.normal(jax.random.key(1), (batch, heads, group, head_dim), dtype)
    asked = jnp.ones(batch)
    lengths = jnp.asarray(np.ceil(np.linspace(*filled, batch + 1)[1:] * slots), jnp.int32)
    one = 2 * batch * heads * slots * head_dim * jnp.dtype(dtype).itemsize
    count = max(2, -(-CACHES_BYTES // one)) if one > 2**22 else 2
    vectors = [jax.random.normal(jax.random.key(2 + i), shape, dtype) for i in range(count)]
    caches = [(held(case.keys, x), held(case.values, -x)) for x in vectors]
    live = float(jnp.sum(lengths)) / (batch * slots) * sum(
        nbytes(x.coded) if isinstance(x, CodedSlots) else nbytes(x) for x in caches[0]
    )  # fmt: skip
    position = lengths[:, None] - 1
    ones = jnp.ones((batch, 1))

    def at_once(q: jax.Array, k: Any, v: Any) -> jax.Array:
        k, v = (x.coder.decode(x.coded) if isinstance(x, CodedSlots) else x for x in (k, v))

        def seen(positions: jax.Array) -> jax.Array:
            slot = jax.lax.broadcasted_iota(jnp.int32, (batch, heads, 1, slots), 3)
            return slot <= positions[:, None, :, None]

        y, received = attend_to_slots(q[:, None], k.astype(dtype), v.astype(dtype), seen, position, ones)
        return y[:, 0] + received.sum().astype(dtype) * 1e-9

    def ours(q: jax.Array, k: Any, v: Any) -> jax.Array:
        y, received = decode_attention(q, k, v, jnp.broadcast_to(lengths[:, None], (batch, heads)), asked=asked)
        return y + jnp.sum(received).astype(dtype) * 1e-9

    def in_pages(table: jax.Array, q: jax.Array, k: Any, v: Any) -> jax.Array:
        y, received = paged_decode_attention(q, k, v, table, lengths, asked=asked)
        return y + jnp.sum(received).astype(dtype) * 1e-9

    side: Callable[..., jax.Array] = ours
    paged = caches
    if case.page:
        order = np.random.default_rng(0).permutation(batch * slots // case.page).reshape(batch, -1)
        side = partial(in_pages, jnp.asarray(order, jnp.int32))
        paged = [tuple(into_pages(x, order, case.page) for x in pair) for pair in caches]
    programs = [(jax.jit(partial(chain, side)), paged), (jax.jit(partial(chain, at_once)), caches)]
    best = [float("inf")] * 2
    for turn in range(repeats + 1):
        for i, (program, operands) in enumerate(programs):
            began = time.perf_counter()
            jax.block_until_ready(program(q, operands))
            if turn:  # the first one compiles
                best[i] = min(best[i], (time.perf_counter() - began) / count)
    return Timed(ours=best[0], at_once=best[1], live=live)


def chain(attention: Callable[..., jax.Array], q: jax.Array, caches: list[Any]) -> jax.Array:
    """One after the other: each waits for the one before."""
    for k, v in caches:
        q = q + attention(q, k, v) * 1e-3
    return q


def into_pages(x: jax.Array, order: np.ndarray, page: int) -> jax.Array:
    """The slots of every row on the pages that `order` names."""
    batch, heads, slots, head_dim = x.shape
    pages = x.reshape(batch, heads, slots // page, page, head_dim).swapaxes(1, 2).reshape(-1, heads, page, head_dim)
    return jnp.zeros_like(pages).at[order.ravel()].set(pages)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.attention", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small caches and no bars")
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    device, model = jax.devices()[0], MODELS[arguments.model]
    cpu = device.platform == "cpu"
    batch, slots, repeats = (2, 256, 2) if arguments.smoke else (arguments.batch, arguments.slots, arguments.repeats)
    heads = 2 if arguments.smoke else model.kv_heads
    dtype = jnp.float32 if cpu else jnp.bfloat16
    limit = triad(os.cpu_count() or 1, size=1 << (20 if arguments.smoke else 25)) if cpu else copy_bandwidth()
    table = Table(title=f"{device.device_kind}: the limit is {limit / 1e9:.1f} GB/s; {batch} rows, {slots} slots")
    for column in ("cache", "filled", "live MB", "us", "GB/s", "of limit", "at once us", "ratio"):
        table.add_column(column, justify="left" if column in ("cache", "filled") else "right")
    bars, extra = {}, {"limit GB/s": limit / 1e9, "device": device.device_kind}
    for case in cases(model.head_dim):
        for name, filled in FILLED.items():
            shape = (batch, heads, slots, model.head_dim)
            found = measure(case, shape, model.heads // model.kv_heads, dtype, filled, repeats)
            rate, ratio = found.live / found.ours, found.at_once / found.ours
            numbers = (found.live / 1e6, found.ours * 1e6, rate / 1e9, rate / limit, found.at_once * 1e6, ratio)
            table.add_row(case.name, name, *(f"{number:.3g}" for number in numbers))
            extra[f"{case.name}, {name}: of the limit"] = rate / limit
            extra[f"{case.name}, {name}: ratio"] = ratio
            if not (arguments.smoke or cpu) and case.name in ("dense", "int8", "pages of 128") and name == "full":
                bars[f"{case.name}: of the bandwidth"] = Bar(rate / limit, low=0.8)
    Console(width=120).print(table)
    return conclude("kernels_attention", bars, extra)


if __name__ == "__main__":
    sys.exit(main())
