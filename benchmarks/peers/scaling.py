"""How the cost of our GPTQ grows: with the layers of a model, and with the inputs of one matrix."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

import effjax as ej
from effjax.lift.calibrate import InputStats
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, stages
from effjax.recipe import Recipe
from effjax.sequential import compress_sequentially

LAYERS, WIDTH, INPUTS = (2, 4, 8, 16), 128, (256, 512, 1024, 2048)
WINDOWS, LENGTH, REPEATS = 16, 64, 3
COMPILATION = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Compilations:
    """Programs handed to the compiler, and the seconds it took."""

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def counted() -> Iterator[Compilations]:
    """Counts the compilations inside the block."""
    found = Compilations()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILATION:
            found.count += 1
            found.seconds += duration_secs

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(listen)


def seconds(fn: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Processor seconds of `fn` once it is compiled: the least of several runs, which other processes disturb least."""
    jax.block_until_ready(fn())
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(fn())
        taken.append(time.process_time() - start)
    return min(taken)


def decoder(layers: int) -> tuple[DecoderConfig, Any]:
    """A decoder of random weights, and its parameters."""
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return config, Decoder(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth:
    """What a model of `layers` costs: compilations of the first run, seconds of a later one."""

    layers: int
    compilations: int
    again: int
    seconds: float


def by_layers(method: Any) -> list[Depth]:
    """Sequential compression of models that differ in depth alone, from a cold start each."""
    tokens = np.random.default_rng(0).integers(0, 512, (WINDOWS, LENGTH)).astype(np.int32)
    found = []
    for layers in LAYERS:
        config, params = decoder(layers)
        recipe = Recipe(rules=((None, method),))

        def compress(config: DecoderConfig = config, params: Any = params, recipe: Recipe = recipe) -> Any:
            return compress_sequentially(params, recipe, stages(config), tokens)

        jax.clear_caches()
        with counted() as first:
            jax.block_until_ready(compress())
        with counted() as second:
            taken = seconds(compress, repeats=1)
        found.append(Depth(layers=layers, compilations=first.count, again=second.count, seconds=taken))
    return found


def by_inputs(method: Any) -> dict[int, float]:
    """Seconds of one square matrix by its inputs, statistics given."""
    found = {}
    for n in INPUTS:
        x = jax.random.normal(jax.random.key(n), (2 * n, n))
        sums = InputStats(count=jnp.float32(len(x)), outer_sum=x.T @ x)
        params = {"kernel": jax.random.normal(jax.random.key(1), (n, n))}
        found[n] = seconds(
            lambda params=params, sums=sums: ej.quantize_params(params, method, stats={"kernel": sums}), repeats=2
        )
    return found


def linearity(depths: list[Depth]) -> tuple[float, float]:
    """Seconds a layer, and the largest departure from the straight line as a fraction of the time."""
    x, y = np.array([d.layers for d in depths]), np.array([d.seconds for d in depths])
    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(np.abs(y - slope * x - start).max() / y.max())


def exponent(times: dict[int, float]) -> float:
    """Power of the inputs that the time grows with, between the two largest."""
    (a, fast), (b, slow) = sorted(times.items())[-2:]
    return float(np.log(slow / fast) / np.log(b / a))
