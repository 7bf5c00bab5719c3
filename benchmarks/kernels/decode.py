"""A decoder of 1.1 billion weights at 4 bits, beside llama.cpp and beside its own dense form, token by token.

    python -m benchmarks.kernels.decode [--environment DIR] [--threads 2]
    python -m benchmarks.kernels.decode --layers 2 --repeats 1    (a quick look)

The model has TinyLlama's shape and random weights. All projections and the head are rounded to nearest at 4 bits,
symmetric, with float16 scales; the token table is float32. effjax runs in groups of 128 with int8 activations and a
cache of float16: llama.cpp has such activations and such a cache as well. A second side of effjax runs what Q4_0 holds,
groups of 32, with activations as exact as float32: llama.cpp reads these very codes and scales from a file that effjax
wrote, and their logits are compared. The dense side is the same values in float32, by XLA.
A run is a prompt of 512 tokens, then single tokens, the likeliest each time; the sides take turns. llama.cpp runs in an
environment of its own, built from source with pip where `--environment` has none. Caches of the other sides are
float32. Loading, compiling and a first run of each side are not counted.

Bytes of a token are those of the weights and of the cache that a step reads; the triad is measured in the same run.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.kernels.stream import triad
from benchmarks.peers.llama_cpp import Worker, environment
from effjax.errors import EffjaxError
from effjax.io.formats.gguf_model import write_model
from effjax.models.compiled_generate import CompiledGenerate, compile_generate
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.paths import leaves_with_paths, nest

TINYLLAMA = DecoderConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
Q4_0 = ej.quantize.RTN(bits=4, group_size=32, symmetric=True)
WIDER = ej.quantize.RTN(bits=4, group_size=128, symmetric=True)
OURS, SAME = "effjax 4 bits, group 128, int8 activations", "effjax 4 bits, Q4_0's codes, exact"
DENSE, PEER = "effjax float32", "llama.cpp Q4_0"


def random_params(config: DecoderConfig, method: Any, seed: int = 0) -> Any:
    """Packed random weights, made one after the other so that no dense model is ever held."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    packed = jax.jit(method.quantize)
    flat: dict[str, Any] = {}
    for number, (path, leaf) in enumerate(leaves_with_paths(shapes)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        if leaf.ndim == 1:
            flat[path] = jnp.ones(leaf.shape, leaf.dtype)
        else:
            dense = jax.random.normal(key, leaf.shape, leaf.dtype) * leaf.shape[0] ** -0.5
            flat[path] = dense if path.startswith("embed/") else packed(dense)
    return jax.block_until_ready(nest(flat))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds of the prompt with its first token, and of a token after it."""

    first_token_s: float
    token_s: float
    tokens: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of those compared: how to run it, and the bytes that a token takes."""

    name: str
    run: Callable[[], Run]
    bytes_per_token: int


def our_side(
    name: str, config: DecoderConfig, params: Any, prompt: list[int], new: int, *, like_peer: bool = False
) -> tuple[Side, Any]:
    """effjax with compressed or dense parameters, and a function for the logits behind the prompt.

    `like_peer` has what llama.cpp has: int8 activations, and a cache of float16.
    """
    # Lifted with no allowance: a dense copy of a packed weight would raise.
    apply = ej.lift(DecoderApply(config), on_materialize="error", limit=0)
    if any(map(ej.is_compressed, jax.tree.leaves(params, is_leaf=ej.is_compressed))):
        params = ej.prepare(params, activation_bits=8 if like_peer else None)
    tokens, lengths = jnp.asarray([prompt], jnp.int32), jnp.asarray([len(prompt)], jnp.int32)

    def cache() -> Any:
        dtype = "float16" if like_peer else None
        return new_cache(config, batch=1, slots=len(prompt) + new + 1, split=True, dtype=dtype)

    compiled: CompiledGenerate = compile_generate(apply, params, cache(), tokens, lengths, max_new_tokens=new + 1)
    print(f"decode: {name}: compiled in {compiled.compile_s:.0f} s", file=sys.stderr)

    def run() -> Run:
        written, _, stats = compiled.run(params, cache(), tokens, lengths)
        return Run(first_token_s=stats.first_token_s, token_s=stats.decode_s / stats.steps, tokens=written[0].tolist())

    def logits() -> np.ndarray:
        step = jax.jit(apply, static_argnames="last_only")
        return np.asarray(step({"params": params}, tokens, cache=cache(), lengths=lengths, last_only=True)[0][0, 0])

    *_, stats = compiled.run(params, cache(), tokens, lengths)
    return Side(name=name, run=run, bytes_per_token=stats.weight_bytes + stats.cache_bytes), logits


def llama_side(worker: Worker, file: Path, config: DecoderConfig, prompt: list[int], new: int) -> Side:
    """llama.cpp with the file; its bytes are the matrices of the file, and the cache in float16."""

    def run() -> Run:
        answer = worker.generate(file, prompt, new)
        return Run(first_token_s=answer["first_token_s"], token_s=answer["decode_s"] / new, tokens=answer["tokens"])

    table = 4 * config.vocab_size * config.hidden_size
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (len(prompt) + new + 1)
    return Side(name=PEER, run=run, bytes_per_token=file.stat().st_size - table + cache)


def take_turns(sides: list[Side], repeats: int) -> dict[str, list[Run]]:
    """Every side once a round, in an order that changes."""
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for side in sides:
        side.run()  # not counted: pages are touched, threads are started
    for number in range(repeats):
        for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
            runs[side.name].append(side.run())
    return runs


def show(sides: list[Side], runs: dict[str, list[Run]], prompt: int, limit: float) -> dict[str, dict[str, float]]:
    """Prints the median of every side and returns the figures."""
    table = Table(title=f"Median of {len(runs[OURS])} runs; triad {limit / 1e9:.1f} GB/s")
    columns = ("", "tokens/s", "prompt tokens/s", "first token s", "bytes a token", "GB/s", "of the triad")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    figures = {}
    for side in sides:
        token = statistics.median(run.token_s for run in runs[side.name])
        first = statistics.median(run.first_token_s for run in runs[side.name])
        rate = side.bytes_per_token / token
        figures[side.name] = {
            "tokens/s": 1 / token,
            "prompt tokens/s": prompt / first,
            "first token s": first,
            "bytes a token": side.bytes_per_token,
            "GB/s": rate / 1e9,
            "of the triad": rate / limit,
        }
        table.add_row(
            side.name,
            f"{1 / token:.2f}",
            f"{prompt / first:.1f}",
            f"{first:.2f}",
            f"{side.bytes_per_token:,}",
            f"{rate / 1e9:.1f}",
            f"{rate / limit:.2f}",
        )
    Console(width=120).print(table)
    return figures


def ratio(runs: dict[str, list[Run]], other: str, of: Callable[[Run], float]) -> tuple[float, list[float]]:
    """How many times faster than `other`: the ratio of the medians, and that of each round."""
    times = {name: [of(run) for run in runs[name]] for name in (OURS, other)}
    rounds = [theirs / ours for ours, theirs in zip(times[OURS], times[other], strict=True)]
    return statistics.median(times[other]) / statistics.median(times[OURS]), rounds


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How far two sides' logits behind the prompt are apart, relative to their spread."""
    error = np.sqrt(np.mean((ours - theirs) ** 2)) / np.std(ours)
    return {"relative error": float(error), "same likeliest": float(ours.argmax() == theirs.argmax())}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.decode", description=__doc__)
    parser.add_argument("--environment", type=Path, help="of llama.cpp; built there if missing (default: temporary)")
    parser.add_argument("--threads", type=int, default=2, help="cores that every side may use")
    parser.add_argument("--layers", type=int, default=TINYLLAMA.num_hidden_layers)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded after the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", nargs="*", default=[], choices=[DENSE, PEER], help="sides to leave out")
    arguments = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= arguments.threads <= len(cores):
        print(f"decode: --threads {arguments.threads}: this process may use {len(cores)} cores", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, cores[: arguments.threads])  # before the first program: XLA counts its cores then
    config = dataclasses.replace(TINYLLAMA, num_hidden_layers=arguments.layers)
    with tempfile.TemporaryDirectory(prefix="effjax-decode-") as made:
        try:
            return measure(arguments, config, Path(made))
        except (EffjaxError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"decode: {error}", file=sys.stderr)
            return 2


def measure(arguments: argparse.Namespace, config: DecoderConfig, work: Path) -> int:
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, arguments.prompt).tolist()
    new = arguments.new
    params = random_params(config, Q4_0)
    dense = DENSE not in arguments.without
    same, our_logits = our_side(SAME, config, params, prompt, new)
    sides = [our_side(OURS, config, random_params(config, WIDER), prompt, new, like_peer=True)[0], same]
    load = os.getloadavg()[0]
    if load > arguments.threads + 1:  # this process counts as well
        print(
            f"decode: the load is {load:.1f}: other work takes cores and bandwidth, so no figure counts",
            file=sys.stderr,
        )
    extra: dict[str, Any] = {
        "triad GB/s": triad(arguments.threads) / 1e9,
        "threads": arguments.threads,
        "load before the runs": load,
    }
    bars: dict[str, Bar] = {}
    if PEER not in arguments.without:
        file = work / "model-q4_0.gguf"
        verdicts = write_model(file, config, params)
        written = sorted({verdict.kind for verdict in verdicts})
        print(f"decode: {file.name}: {file.stat().st_size:,} bytes of {', '.join(written)}, exact", file=sys.stderr)
        python = environment(arguments.environment or work / "llama_cpp")
        with Worker(python, work / "llama_cpp.log", threads=arguments.threads) as worker:
            print(f"decode: llama-cpp-python {worker.version}: {worker.system}", file=sys.stderr)
            worker.generate(file, prompt, new, logits=work / "logits.npy")
            extra["agreement with llama.cpp"] = agreement(our_logits(), np.load(work / "logits.npy"))
            sides.append(llama_side(worker, file, config, prompt, new))
            if dense:
                sides.append(dense_side(config, params, prompt, new))
            runs = take_turns(sides, arguments.repeats)
        bars |= {
            "decoding, effjax / llama.cpp": bar(runs, PEER, lambda run: run.token_s, 1.1, extra),
            "prompt, effjax / llama.cpp": bar(runs, PEER, lambda run: run.first_token_s, 1.0, extra),
        }
    else:
        if dense:
            sides.append(dense_side(config, params, prompt, new))
        runs = take_turns(sides, arguments.repeats)
    if dense:
        bars["decoding, 4 bits / float32"] = bar(runs, DENSE, lambda run: run.token_s, 4.0, extra)
        bars["prompt, 4 bits / float32"] = bar(runs, DENSE, lambda run: run.first_token_s, 1.0, extra)
    extra["sides"] = show(sides, runs, len(prompt), extra["triad GB/s"] * 1e9)
    return conclude("kernels/decode", bars, extra)


def dense_side(config: DecoderConfig, params: Any, prompt: list[int], new: int) -> Side:
    """The same values in float32."""
    return our_side(DENSE, config, ej.materialize(params), prompt, new)[0]


def bar(runs: dict[str, list[Run]], other: str, of: Callable[[Run], float], low: float, extra: dict[str, Any]) -> Bar:
    """The bar on a ratio; that of each round goes into `extra`."""
    value, rounds = ratio(runs, other, of)
    extra.setdefault("rounds", []).append([round(r, 3) for r in rounds])
    return Bar(value, low=low)


if __name__ == "__main__":
    raise SystemExit(main())
