"""Claims of `lift`: no extra memory forward or backward, little trace time, no dense weight in a decode step.

python -m benchmarks.claims.lift
"""

import gc
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import effjax as ej
from benchmarks.bars import Bar, conclude
from effjax.arrays import is_compressed
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, new_cache

LAYERS, WIDTH, BATCH = 16, 512, 4
REPEATS = 15


class Block(nn.Module):
    """One layer of the stack whose memory is compared."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x + nn.gelu(nn.Dense(WIDTH, use_bias=False)(x)), None


class Stack(nn.Module):
    """`LAYERS` blocks under `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return blocks()(x, None)[0]


def temporary_bytes(fn: Callable[..., Any], *args: Any) -> int:
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def memory() -> dict[str, int]:
    """Temporary bytes of the compiled stack, dense, lifted, and the two naive ways."""
    model = Stack()
    x = jnp.ones((BATCH, WIDTH))
    params = model.init(jax.random.key(0), x)
    qparams = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None, symmetric=True))
    lifted = ej.lift(model.apply)

    def whole_tree(params: Any, x: jax.Array) -> jax.Array:
        return model.apply(ej.materialize(params), x)

    def each_layer(params: Any, x: jax.Array) -> jax.Array:
        """What differentiating a dequantise-then-matmul inside the scan costs."""

        def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            return x + nn.gelu(x @ w.materialize()), None

        (kernel,) = (leaf for leaf in jax.tree.leaves(params, is_leaf=is_compressed) if is_compressed(leaf))
        return jax.lax.scan(layer, x, kernel)[0]

    def gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda x, params: fn(params, x).sum())

    return {
        "dense forward": temporary_bytes(model.apply, params, x),
        "lifted forward": temporary_bytes(lifted, qparams, x),
        "whole tree dequantised forward": temporary_bytes(whole_tree, qparams, x),
        "dense gradient": temporary_bytes(gradient(model.apply), x, params),
        "lifted gradient": temporary_bytes(gradient(lifted), x, qparams),
        "dequantised in the scan, gradient": temporary_bytes(gradient(each_layer), x, qparams),
    }


def decoder(layers: int, *, scan: bool) -> tuple[Decoder, Any]:
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        scan_layers=scan,
    )
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return model, shapes["params"]


def trace_ratio(*, cold: bool) -> dict[str, float]:
    """Time to trace and lower an unrolled 12-layer decoder, lifted over dense, repeats interleaved.

    Args:
        cold: empty jax's caches before each, as in the first trace of a process; otherwise as in every later one.
    """
    model, shapes = decoder(12, scan=False)
    qshapes = jax.eval_shape(lambda p: ej.quantize_params(p, ej.quantize.RTN(bits=4, group_size=32)), shapes)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def seconds(apply: Callable[..., Any], params: Any) -> float:
        """CPU seconds of a fresh trace; the garbage collector waits, as in timeit."""
        if cold:
            jax.clear_caches()
        gc.collect()
        gc.disable()
        start = time.process_time()
        jax.jit(lambda p, t: apply({"params": p}, t)).lower(params, tokens)
        end = time.process_time()
        gc.enable()
        return end - start

    arms = {"dense": (model.apply, shapes), "lifted": (ej.lift(model.apply), qshapes)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(REPEATS + 1):
        for name, (apply, params) in arms.items():
            times[name].append(seconds(apply, params))
    times = {name: values[1:] for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = [lifted / dense for lifted, dense in zip(times["lifted"], times["dense"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "dense seconds": median["dense"],
        "lifted seconds": median["lifted"],
        "ratio of medians": median["lifted"] / median["dense"],
        "quartile 1": low,
        "quartile 3": high,
    }


def dense_copies(*, scan: bool) -> list[str]:
    """Buffers of the compiled decode step as large as a compressed weight that hold floating numbers."""
    model, shapes = decoder(4, scan=scan)
    method = ej.quantize.RTN(bits=4, group_size=32)
    qshapes = jax.eval_shape(lambda p: ej.quantize_params(p, method), shapes)
    cache = jax.eval_shape(lambda: new_cache(model.config, batch=1, slots=64))
    apply = ej.lift(model.apply, on_materialize="error", limit=0)

    def step(params: Any, cache: Any, token: jax.Array) -> Any:
        return apply({"params": params}, token, cache=cache, lengths=jnp.ones(1, jnp.int32))

    compiled = jax.jit(step, donate_argnums=1).lower(qshapes, cache, jax.ShapeDtypeStruct((1, 1), jnp.int32)).compile()
    sizes = {
        leaf.shape[-2] * leaf.shape[-1]
        for leaf in jax.tree.leaves(qshapes, is_leaf=is_compressed)
        if is_compressed(leaf)
    }
    return floating_buffers(compiled.as_text(), sizes)


def floating_buffers(hlo: str, sizes: set[int]) -> list[str]:
    """Results of instructions outside fused computations that hold at least the smallest of `sizes` floats."""
    found, fused = [], False
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            fused = "fused_computation" in line.split("(")[0]
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (?:f32|bf16|f16)\[([\d,]+)\]\S* (\w[\w\-]*)", line)
        if fused or not match or match.group(3) in ("parameter", "get-tuple-element", "bitcast", "constant"):
            continue
        count = 1
        for size in match.group(2).split(","):
            count *= int(size)
        if count >= min(sizes):
            found.append(f"{match.group(1)}[{match.group(2)}]")
    return found


def main() -> int:
    size = memory()
    for name, value in size.items():
        print(f"{name:<36} {value:>12,} temporary bytes")
    trace, first = trace_ratio(cold=False), trace_ratio(cold=True)
    print("trace and lower:", ", ".join(f"{name} {value:.3f}" for name, value in trace.items()))
    print("the same with empty caches:", ", ".join(f"{name} {value:.3f}" for name, value in first.items()))
    copies = {"unrolled": dense_copies(scan=False), "scanned": dense_copies(scan=True)}
    for name, found in copies.items():
        print(f"dense weights in the {name} decode step: {found or 'none'}")
    bars = {
        "gradient under scan, temporary bytes over dense": Bar(
            size["lifted gradient"] / size["dense gradient"], high=1.10, paper="qwix, quax: 16x"
        ),
        "forward, temporary bytes over dense": Bar(size["lifted forward"] / size["dense forward"], high=1.05),
        "trace and lower time over dense": Bar(trace["ratio of medians"], high=1.20, paper="quax 1.21x, qwix 0.9x"),
        "dense weights in a decode step": Bar(sum(map(len, copies.values())), high=0),
    }
    naive = size["dequantised in the scan, gradient"] / size["dense gradient"]
    return conclude(
        "lift",
        bars,
        {"naive gradient over dense": naive, "cold ratio of medians": first["ratio of medians"], **trace, **size},
    )


if __name__ == "__main__":
    raise SystemExit(main())
