"""Claims of NoMAD: look-ups are faster than products with keys, and cost little quality.

python -m benchmarks.claims.nomad [--data DIR] [--seeds 0 1 2] [--parts speed quality] [--threads 1 2]

Speed, in processes of their own with as many processors as threads: 8 heads of 128 channels, one query each, keys and
values beyond the second-level cache. All sides take turns and the fastest of many turns counts. The look-up loop is
measured by float32 products with the keys (XLA's and BLAS's, the faster one); a step of decoding, which codes and
writes a key, writes a value, makes the table and attends, by the same step with float32 keys: the attention of
`effjax.models.attention`, and one of BLAS products, the faster one. Eight steps a program, arrays updated in place.
With bfloat16 values no side writes one, nor the baseline its key: XLA would convert the whole array for it.

Quality: teacher-forced perplexity of the embedded model, and of stories260K with `--data`, all keys coded (the last
block too, which decoding keeps exact: a row of its own). Codebooks from 64 training windows, judged on others.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.claims.cq import Subject, embedded_subject, stories_subject
from benchmarks.language_models import missing
from effjax.evaluate import compare_many
from effjax.kv import NoMAD
from effjax.kv.capture import capture_kv
from effjax.kv.nomad import encode, lookup_logits, query_table
from effjax.kv.nomad_attention import append_key, code_keys, nomad_attention
from effjax.kv.nomad_text import NomadLayers, apply_nomad, learn_layers
from effjax.models.attention import attend_to_slots

HEADS, HEAD_DIM, STEPS, D_SUBS = 8, 128, 8, (1, 2, 4)
LENGTHS = (4096, 8192, 16384)
WINDOWS, LENGTH, ITERATIONS = 64, 256, 32  # of calibration; tokens of a window; of k-means
LOOKUP_BARS = {1: 2.0, 4: 4.0}
STEP_BARS = {4096: 1.3, 16384: 2.0}

# ---- speed -----------------------------------------------------------------------------------------------------------


def fastest(programs: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Seconds of the fastest turn of each; the first turn compiles."""
    found = dict.fromkeys(programs, float("inf"))
    for turn in range(turns + 2):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            if turn > 1:
                found[name] = min(found[name], time.perf_counter() - began)
    return found


def products(slots: int, turns: int) -> dict[str, float]:
    """Seconds of the logits of all heads: float32 products, and look-ups."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, HEADS, slots, HEAD_DIM), np.float32)
    q = rng.standard_normal((1, HEADS, 1, HEAD_DIM), np.float32)
    keys, queries = jnp.asarray(k), jnp.asarray(q)
    keys_first = jax.jit(lambda q, k: jnp.einsum("bhsd,bhgd->bhsg", k, q))
    queries_first = jax.jit(lambda q, k: jnp.einsum("bhgd,bhsd->bhgs", q, k))
    programs: dict[str, Callable[[], Any]] = {
        "XLA, keys first": lambda: keys_first(queries, keys),
        "XLA, queries first": lambda: queries_first(queries, keys),
        "BLAS": lambda: [k[0, h] @ q[0, h, 0] for h in range(HEADS)],
    }
    look = jax.jit(lookup_logits)
    for d_sub in D_SUBS:
        books = jnp.asarray(rng.standard_normal((HEADS, HEAD_DIM // d_sub, 16, d_sub), np.float32))
        codes, tables = jax.jit(encode)(keys, books), jax.jit(query_table)(queries, books)
        programs[f"look-ups, d_sub {d_sub}"] = lambda tables=tables, codes=codes: look(tables, codes)
    return fastest(programs, turns)


def steps(slots: int, dtype: str, turns: int) -> dict[str, float]:
    """Seconds of one step of decoding that ends with all slots full, keys and values as said."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    k, v = draw(1, HEADS, slots, HEAD_DIM), draw(1, HEADS, slots, HEAD_DIM).astype(dtype)
    q, new_k, new_v = (draw(STEPS, 1, HEADS, HEAD_DIM) for _ in range(3))
    start = slots - STEPS
    programs: dict[str, Callable[[], Any]] = {}

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, at: Any) -> jax.Array:
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, HEADS, 1, slots), 3)
        positions = jnp.full((1, 1), at, jnp.int32)
        y, _ = attend_to_slots(q, k, v, lambda p: slot <= p[:, None, :, None], positions, jnp.ones((1, 1)))
        return y.astype(jnp.float32)

    def dense(name: str, key_dtype: str) -> None:
        def step(i: Any, state: Any) -> Any:
            k, v, y = state
            if dtype == "float32":
                k, v = write(k, new_k[i], start + i), write(v, new_v[i], start + i)
            query = (q[i] + 1e-9 * y).astype(k.dtype)
            return k, v, attention(query[:, None, :, None], k, v, start + i).reshape(1, HEADS, HEAD_DIM)

        program = jax.jit(
            lambda k, v: jax.lax.fori_loop(0, STEPS, step, (k, v, jnp.zeros((1, HEADS, HEAD_DIM)))),
            donate_argnums=(0, 1),
        )
        held = {"state": (k.astype(key_dtype) + 0, v + 0)}

        def run() -> jax.Array:
            *state, y = program(*held["state"])
            held["state"] = tuple(state)
            return y

        programs[name] = run

    for key_dtype in dict.fromkeys(("float32", dtype)):
        dense(f"decoder's attention, {key_dtype} keys", key_dtype)
    if dtype == "float32":
        programs["BLAS"] = blas_step(np.array(k[0]), np.array(v[0]), *(np.asarray(x)[:, 0] for x in (q, new_k, new_v)))
    for d_sub in D_SUBS:
        programs[f"NoMAD, d_sub {d_sub}"] = nomad_step(d_sub, k, v, q, new_k, new_v)
    return {name: seconds / STEPS for name, seconds in fastest(programs, turns).items()}


def write(x: jax.Array, new: jax.Array, at: Any) -> jax.Array:
    """One slot of every head, as the decoder's cache writes it: XLA does other forms in a copy of the whole array."""
    row, head = (jax.lax.broadcasted_iota(jnp.int32, (1, HEADS), axis) for axis in (0, 1))
    return x.at[row, head, jnp.full((1, HEADS), at, jnp.int32)].set(new.astype(x.dtype), mode="drop")


def nomad_step(d_sub: int, k: Any, v: Any, q: Any, new_k: Any, new_v: Any) -> Callable[[], jax.Array]:
    slots = k.shape[2]
    start = slots - STEPS
    rng = np.random.default_rng(d_sub)
    books = jnp.asarray(rng.standard_normal((HEADS, HEAD_DIM // d_sub, 16, d_sub), np.float32))

    def step(i: Any, state: Any) -> Any:
        keys, v, y = state
        at = jnp.full((1, HEADS), start + i, jnp.int32)
        keys = append_key(keys, new_k[i], at, books)
        v = write(v, new_v[i], start + i) if v.dtype == jnp.float32 else v
        y, _ = nomad_attention((q[i] + 1e-9 * y)[:, :, None], keys, v, at + 1, books)
        return keys, v, y.reshape(1, HEADS, HEAD_DIM)

    program = jax.jit(
        lambda keys, v: jax.lax.fori_loop(0, STEPS, step, (keys, v, jnp.zeros((1, HEADS, HEAD_DIM)))),
        donate_argnums=(0, 1),
    )
    held = {"state": (jax.jit(code_keys)(k, jnp.full((1, HEADS), start, jnp.int32), books), v + 0)}

    def run() -> jax.Array:
        *state, y = program(*held["state"])
        held["state"] = tuple(state)
        return y

    return run


def blas_step(k: Any, v: Any, q: Any, new_k: Any, new_v: Any) -> Callable[[], np.ndarray]:
    start = k.shape[1] - STEPS

    def run() -> np.ndarray:
        y = np.zeros((HEADS, HEAD_DIM), np.float32)
        for i in range(STEPS):
            end = start + i + 1
            k[:, end - 1], v[:, end - 1] = new_k[i], new_v[i]
            for h in range(HEADS):
                logits = k[h, :end] @ (q[i, h] * np.float32(HEAD_DIM**-0.5))
                powers = np.exp(logits - logits.max())
                y[h] = (powers @ v[h, :end]) / powers.sum()
        return y

    return run


def measure(turns: int) -> dict[str, Any]:
    """What a process of its own prints: seconds by length and name."""
    found: dict[str, Any] = {}
    for slots in LENGTHS:
        found[str(slots)] = {
            "logits": products(slots, turns),
            "float32 values": steps(slots, "float32", turns // 2),
            "bfloat16 values": steps(slots, "bfloat16", turns // 2),
        }
    return found


def in_process(threads: int, turns: int) -> dict[str, Any]:
    """`measure` on that many processors, with as many threads for BLAS, XLA and the kernels."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.claims.nomad", "--measure", str(threads), "--turns", str(turns)]
    done = subprocess.run(command, env=os.environ | count, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bytes_a_key(name: str, dtype: str) -> float:
    """Bytes of keys and values that one query reads."""
    values = HEAD_DIM * jnp.dtype(dtype).itemsize
    if name.startswith("NoMAD"):
        return values + HEAD_DIM / int(name[-1]) / 2
    return values + HEAD_DIM * (2 if "bfloat16 keys" in name else 4)


def show_speed(threads: int, found: dict[str, Any]) -> dict[str, Bar]:
    """Prints every time beside the fastest baseline; bars for one thread and float32."""
    bars: dict[str, Bar] = {}
    lookups: dict[int, list[float]] = {d_sub: [] for d_sub in D_SUBS}
    for slots in LENGTHS:
        for part, times in found[str(slots)].items():
            ours = [name for name in times if name.startswith(("look-ups", "NoMAD"))]
            base = min((name for name in times if name not in ours), key=lambda name: times[name])
            unit = 1e6 / HEADS
            table = Table(title=f"{threads} thread{'s' if threads > 1 else ''}, {slots} keys, {part}")
            for column in ("", "us a head", "GB/s of keys and values", "fastest baseline / this", "by bytes"):
                table.add_column(column)
            for name, seconds in times.items():
                nbytes, limit = HEAD_DIM * 4.0, ""
                if part != "logits":
                    nbytes = bytes_a_key(name, part.split()[0])
                    limit = f"{bytes_a_key(base, part.split()[0]) / nbytes:.2f}"
                elif name in ours:
                    nbytes = HEAD_DIM / int(name[-1]) / 2
                    limit = f"{HEAD_DIM * 4 / nbytes:.0f}"
                rate, ratio = nbytes * slots * HEADS / seconds / 1e9, times[base] / seconds
                table.add_row(name, f"{seconds * unit:.1f}", f"{rate:.1f}", f"{ratio:.2f}", limit)
                if name in ours and part == "logits":
                    lookups[int(name[-1])].append(ratio)
                if name.startswith("NoMAD") and part == "float32 values" and slots in STEP_BARS and name[-1] in "14":
                    bars[f"{slots} keys, whole step, d_sub {name[-1]}"] = Bar(ratio, low=STEP_BARS[slots], paper="2x")
            Console(width=120).print(table)
    for d_sub, low in LOOKUP_BARS.items():
        bars[f"look-ups, d_sub {d_sub}: least over lengths"] = Bar(min(lookups[d_sub]), low=low, paper="5 to 10x")
    return bars


# ---- quality ---------------------------------------------------------------------------------------------------------


def arms(full: bool) -> dict[str, tuple[NoMAD, dict[str, bool]]]:
    """Method, and fields of `NomadLayers`, by name; further seeds judge the tables that are bars."""
    found: dict[str, tuple[NoMAD, dict[str, bool]]] = {}
    for d_sub, fisher in ((1, False), (2, False), (4, False), (4, True)):
        method = NoMAD(d_sub=d_sub, iterations=ITERATIONS, fisher=fisher)
        name = f"d_sub {d_sub}{', Fisher' if fisher else ''}"
        found[name] = method, {"eight_bits": True, "recent": False}
        if not fisher:
            found[f"{name}, float tables"] = method, {"eight_bits": False, "recent": False}
        if full:
            found[f"{name}, last block exact"] = method, {"eight_bits": True, "recent": True}
    return found


def perplexities(subject: Subject, seed: int, *, full: bool) -> dict[str, dict[str, float]]:
    model, config = subject.task.model, subject.task.model.config
    captured = capture_kv(config, model.params, subject.task.calibration(seed, WINDOWS))
    layers: dict[NoMAD, NomadLayers] = {}
    candidates = {}
    for name, (method, fields) in arms(full).items():
        if method not in layers:
            layers[method] = learn_layers(method, config, captured, LENGTH, key=jax.random.key(seed))
        candidates[name] = {"model": model.params, "layers": dataclasses.replace(layers[method], **fields)}

    def apply(variables: Any, tokens: jax.Array) -> jax.Array:
        part = variables["params"]
        if "layers" in part:
            return apply_nomad(config, part["model"], part["layers"], tokens)
        return model.apply({"params": part["model"]}, tokens)

    results = compare_many(apply, {"model": model.params}, candidates, subject.judged, batch_size=8)
    return {
        name: {
            "perplexity": c.perplexity,
            "ratio": c.perplexity / c.perplexity_reference,
            "excess": c.delta_nll,
            "low": c.delta_low,
            "high": c.delta_high,
            "same top-1": c.same_top1,
            "reference": c.perplexity_reference,
        }
        for name, c in results.items()
    }


def show_quality(subject: Subject, runs: list[dict[str, dict[str, float]]]) -> dict[str, Bar]:
    name, reference = subject.task.name, runs[0]["d_sub 1"]["reference"]
    table = Table(title=f"{name}, {len(subject.judged)} windows, perplexity {reference:.4f}")
    for column in ("keys", "perplexity", "ratio", "excess", "95 %, first seed", "same top-1", "ratio of each seed"):
        table.add_column(column)

    def mean(arm: str, figure: str) -> float:
        return statistics.mean(run[arm][figure] for run in runs if arm in run)

    for arm, first in runs[0].items():
        table.add_row(
            arm,
            f"{mean(arm, 'perplexity'):.4f}",
            f"{mean(arm, 'ratio'):.4f}",
            f"{mean(arm, 'excess'):+.4f}",
            f"{first['low']:+.4f} to {first['high']:+.4f}",
            f"{100 * mean(arm, 'same top-1'):.1f} %",
            " ".join(f"{run[arm]['ratio']:.4f}" for run in runs if arm in run),
        )
    Console(width=130).print(table)
    kinds = [f"d_sub {d_sub}" for d_sub in D_SUBS]
    eight = max(abs(run[k]["perplexity"] / run[f"{k}, float tables"]["perplexity"] - 1) for run in runs for k in kinds)
    order = min(run[b]["ratio"] / run[a]["ratio"] for run in runs for a, b in zip(kinds, kinds[1:], strict=False))

    def above(arm: str) -> float:
        return mean(arm, "perplexity") - mean(arm, "reference")

    cut = 1 - above("d_sub 4, Fisher") / above("d_sub 4")
    return {
        f"{name}: perplexity ratio, d_sub 1": Bar(mean("d_sub 1", "ratio"), high=1.01, paper="sheet 1.005"),
        f"{name}: least ratio of one d_sub to the next smaller": Bar(order, low=1.0),
        f"{name}: 8 bits against float tables, largest, %": Bar(100 * eight, high=0.1, paper="sheet 0.02"),
        f"{name}: share of the d_sub 4 excess that Fisher cuts": Bar(cut, low=0.2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.nomad", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory that holds stories260K and its text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration sets and k-means")
    parser.add_argument("--parts", nargs="+", default=["speed", "quality"], choices=["speed", "quality"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="bars are for the first")
    parser.add_argument("--turns", type=int, default=40, help="of every side; the fastest counts")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.measure :])
        print(json.dumps(measure(args.turns)))
        return 0
    if args.data is not None and (name := missing(args.data)):
        print(f"nomad: --data {args.data} holds no {name}; name the directory that does", file=sys.stderr)
        return 2
    bars: dict[str, Bar] = {}
    extra: dict[str, Any] = {}
    if "speed" in args.parts:
        for i, threads in enumerate(args.threads):
            found = in_process(threads, args.turns)
            extra[f"seconds, {threads} threads"] = found
            shown = show_speed(threads, found)
            bars |= shown if i == 0 else {}
    if "quality" in args.parts:
        for subject in [embedded_subject(), *([] if args.data is None else [stories_subject(args.data)])]:
            runs = []
            for i, seed in enumerate(args.seeds):
                runs.append(perplexities(subject, seed, full=i == 0))
                print(f"{subject.task.name}: seed {seed} done", file=sys.stderr)
            bars |= show_quality(subject, runs)
            extra[subject.task.name] = runs
    return conclude("nomad", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
