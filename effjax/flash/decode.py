"""A decoder whose feed-forward weights stay on flash: a token at a time, rows read as its neurons are predicted.

Source: Alizadeh et al., LLM in a flash (2023). Predictors read what enters the up projection of their own layer.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from effjax.errors import ConfigError
from effjax.flash.cache import NeuronCache, apply_update, empty_cache, plan_update
from effjax.flash.file import BundleFile, open_bundles
from effjax.flash.memory import MemoryPlan, plan_memory
from effjax.flash.product import ffn_prefix
from effjax.flash.reader import ReadCount, RowReader, aligned_empty
from effjax.kv.cache import KVCache
from effjax.kv.layer_cache import close_layers, open_layers
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Block, Embed, Head, new_cache, norm
from effjax.models.rope import rotary_angles
from effjax.sparsity.dejavu import Scores

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What one layer did for one token. Counts are of neurons, times in seconds.

    Attributes:
        predicted: that the token uses.
        resident: in the cache afterwards.
        loaded: read and kept.
        passing: read and not kept, since the cache was full.
        moved: bytes copied within the cache.
        reads: requests and bytes.
        attend, manage, read, compute: attention with the predictor; plans and moves; reads; the product.
    """

    predicted: int
    resident: int
    loaded: int
    passing: int
    moved: int
    reads: ReadCount
    attend: float
    manage: float
    read: float
    compute: float


class FlashDecoder:
    """Decodes one text, its feed-forward weights read from a file. Close it, or use it in a `with`.

    Args:
        config: of the decoder; its activation is a ReLU.
        params: of `effjax.flash.resident_params`.
        predictors: scores of each layer's neurons, from what enters its up projection.
        path: of the file that `write_bundles` made of `feed_forwards`.
        budget: bytes for all that `plan_memory` counts; checked before anything is taken.
        window: tokens that a neuron stays in memory; `effjax.flash.largest_window` finds one.
        slots: tokens that the text may have.
        capacity, passing: see `plan_memory`.
        threshold: of scores, above which a neuron is used.
        threads, gap, direct, implementation: of `RowReader`; "python" computes with numpy too.
        helpers: threads that compute, besides the caller.

    Raises:
        ConfigError: see `plan_memory`; or compressed weights or a dtype that the decoder does not take.
        CheckpointError: see `open_bundles`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: PyTree,
        predictors: Sequence[Scores],
        path: str | Path,
        *,
        budget: int,
        window: int,
        slots: int,
        capacity: int | Sequence[int] | None = None,
        passing: int | None = None,
        threshold: float = 0.0,
        threads: int = 15,
        gap: int = 0,
        direct: bool = True,
        implementation: Literal["cpu", "python"] | None = None,
        helpers: int = 1,
    ) -> None:
        if config.hidden_act != "relu":
            raise ConfigError(f"FlashDecoder: hidden_act={config.hidden_act!r}; only ReLUs leave neurons at rest")
        if window < 1:
            raise ConfigError(f"FlashDecoder: window={window}; must be at least 1 token")
        self.config = dataclasses.replace(config, scan_layers=False, remat=False)
        self.file: BundleFile = open_bundles(path)
        self.memory: MemoryPlan = plan_memory(
            self.config,
            params,
            predictors,
            self.file,
            budget=budget,
            slots=slots,
            capacity=capacity,
            passing=passing,
            threads=threads,
            gap=gap,
        )
        self.params, self.predictors = params, list(predictors)
        self.window, self.slots, self.threshold, self.helpers = window, slots, threshold, helpers
        layout = self.file.layout
        self.reader = RowReader(
            path,
            start=self.file.rows_at,
            stride=layout.stride,
            rows=self.file.layers * self.file.neurons,
            threads=threads,
            gap=gap,
            direct=direct,
            implementation=implementation,
        )
        self._caches: list[NeuronCache] = []
        self._beside = [_Beside.empty(c, coded=layout.coded) for c in self.memory.capacity]
        self._passing = aligned_empty(self.memory.passing, layout.stride)
        self._kv: list[KVCache] = []
        self.reset()

    def reset(self) -> None:
        """Forgets the text and its statistics; a new one begins with empty caches."""
        one = dataclasses.replace(self.config, num_hidden_layers=1)
        self._kv, self._caches = [], []  # so that the old ones are gone before the new ones are made
        stride = self.file.layout.stride
        for capacity in self.memory.capacity:
            self._kv.append(new_cache(one, batch=1, slots=self.slots, dtype="float32", split=True))
            self._caches.append(empty_cache(self.file.neurons, capacity, stride))
        self.tokens = 0
        self.trace: list[list[LayerTrace]] = []

    def resident(self, layer: int) -> np.ndarray:
        """Which neurons of a layer are in memory, `bool[neurons]`."""
        return self._caches[layer].resident

    def step(self, token: int) -> Float[Array, " vocab"]:
        """Takes one more token of the text and gives the logits of its successor.

        Raises:
            ConfigError: the key-value cache is full.
        """
        if self.tokens == self.slots:
            raise ConfigError(f"FlashDecoder: the text has its {self.slots} tokens; make the decoder with more slots")
        x = _embed(self.config, self.params["embed"], jnp.int32(token), jnp.int32(self.tokens))
        y = np.zeros((1, 1, self.config.hidden_size), np.float32)
        layers = []
        for i in range(self.config.num_hidden_layers):
            began = time.perf_counter()
            x, self._kv[i], z, active = _attend(
                self.config, self.params[f"layers_{i}"], self.predictors[i], self.threshold, x, y, self._kv[i]
            )
            query, used = np.asarray(z), np.asarray(active)
            total, trace = self._feed_forward(i, query, used, time.perf_counter() - began)
            y = total[None, None]
            layers.append(trace)
        self.trace.append(layers)
        self.tokens += 1
        head = {name: self.params[name] for name in ("final_norm", "lm_head", "embed") if name in self.params}
        return _logits(self.config, head, x, y)

    def _feed_forward(self, layer: int, z: np.ndarray, active: np.ndarray, attend: float) -> tuple[Any, LayerTrace]:
        times, reads = {"read": 0.0, "compute": 0.0}, [ReadCount()]
        first = layer * self.file.neurons

        def read(neurons: np.ndarray, matrix: np.ndarray, rows: np.ndarray) -> None:
            began = time.perf_counter()
            reads.append(self.reader.read(first + neurons, matrix, rows))
            times["read"] += time.perf_counter() - began

        def compute(matrix: np.ndarray, count: int, beside: _Beside) -> np.ndarray:
            began = time.perf_counter()
            y = ffn_prefix(
                z,
                matrix,
                count,
                self.file.layout,
                beside.biases,
                beside.scales,
                pool=self.reader.pool,
                helpers=self.helpers,
            )
            times["compute"] += time.perf_counter() - began
            return y

        began = time.perf_counter()
        cache, beside = self._caches[layer], self._beside[layer]
        plan = plan_update(cache, active, self.tokens, self.window)
        cache = self._caches[layer] = apply_update(cache, plan, read)
        beside.move(plan.moved_from, plan.moved_to)
        beside.fill(self.file, layer, plan.loaded, plan.count)
        manage = time.perf_counter() - began - times["read"]
        y = self.file.down_bias[layer] + compute(cache.matrix, cache.count, beside)
        for i in range(0, len(plan.passing), len(self._passing)):
            some = plan.passing[i : i + len(self._passing)]
            read(some, self._passing, np.arange(len(some)))
            passing = _Beside.empty(len(self._passing), coded=self.file.layout.coded)
            passing.fill(self.file, layer, some, len(some))
            y += compute(self._passing, len(some), passing)
        trace = LayerTrace(
            predicted=int(active.sum()),
            resident=cache.count,
            loaded=len(plan.loaded),
            passing=len(plan.passing),
            moved=len(plan.moved_to) * self.file.layout.stride,
            reads=functools.reduce(lambda a, b: a + b, reads),
            attend=attend,
            manage=manage,
            **times,
        )
        return y, trace

    def close(self) -> None:
        """Ends the reader's threads."""
        self.reader.close()

    def __enter__(self) -> "FlashDecoder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def generate_from_flash(
    decoder: FlashDecoder, prompt: Sequence[int], *, max_new_tokens: int, stop_tokens: Sequence[int] = ()
) -> list[int]:
    """Continues a prompt by the likeliest token, again and again; the prompt runs a token at a time too.

    Args:
        decoder: whose text this goes on with; `reset` it for a new one.
        prompt: at least one token.
        max_new_tokens: the most tokens to write.
        stop_tokens: the text ends with the first of these.

    Returns:
        New tokens.

    Raises:
        ConfigError: an empty prompt, or a text longer than the decoder's slots.
    """
    room = decoder.slots - decoder.tokens
    if not len(prompt) or len(prompt) + max_new_tokens - 1 > room:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones: give at least one token, and make the "
            f"decoder with that many slots ({room} are left)"
        )
    logits = [decoder.step(int(token)) for token in prompt][-1]
    new: list[int] = []
    while len(new) < max_new_tokens:
        new.append(int(jnp.argmax(logits)))
        if new[-1] in stop_tokens or len(new) == max_new_tokens:
            break
        logits = decoder.step(new[-1])
    return new


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Beside:
    """Biases and scales of the neurons in a cache, row by row; written in place like its matrix."""

    biases: np.ndarray  # [2, capacity]
    scales: np.ndarray | None  # [3, capacity]

    @classmethod
    def empty(cls, capacity: int, *, coded: bool) -> "_Beside":
        scales = np.ones((3, capacity), np.float32) if coded else None
        return cls(biases=np.zeros((2, capacity), np.float32), scales=scales)

    def move(self, source: np.ndarray, to: np.ndarray) -> None:
        for array in (self.biases, self.scales):
            if array is not None:
                array[:, to] = array[:, source]

    def fill(self, file: BundleFile, layer: int, neurons: np.ndarray, count: int) -> None:
        """The last rows of the first `count` are those of `neurons`."""
        rows = slice(count - len(neurons), count)
        self.biases[:, rows] = file.biases[layer][:, neurons]
        if self.scales is not None and file.scales is not None:
            self.scales[:, rows] = file.scales[layer][:, neurons]


@functools.partial(jax.jit, static_argnames="config")
def _embed(config: DecoderConfig, params: PyTree, token: jax.Array, position: jax.Array) -> Any:
    return Embed(config).apply({"params": params}, token[None, None], position[None, None])


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _attend(
    config: DecoderConfig, params: PyTree, predictor: Any, threshold: float, x: Any, y: Any, cache: KVCache
) -> tuple[jax.Array, KVCache, jax.Array, jax.Array]:
    """A block up to its feed-forward layer, with what enters that and its predicted neurons; `y` came of the last."""
    x, seen = x + y.astype(x.dtype), []

    def stop(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.path != ("mlp",) or context.method_name != "__call__":
            return call(*args, **kwargs)
        seen.append(args[0])
        return jnp.zeros_like(args[0])

    positions, counts = cache.offset[:, None], jnp.ones(1, jnp.int32)
    opened, layers = open_layers(cache, positions, counts)
    angles = rotary_angles(config, positions, cache.offset + counts)
    with nn.intercept_methods(stop):
        (x, layer), _ = Block(config).apply(  # type: ignore[misc]
            {"params": params}, (x, layers[0]), jnp.int32(0), positions, counts, angles
        )
    z = seen[0][0, 0].astype(jnp.float32)
    cache = close_layers(opened, [layer], counts)
    return x, cache.replace(offset=cache.offset + counts), z, predictor(z) > threshold


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: DecoderConfig, params: PyTree, x: jax.Array, y: jax.Array) -> Any:
    total = x + y.astype(x.dtype)
    x = norm(config, "final_norm").apply({"params": params["final_norm"]}, total)  # type: ignore[assignment]
    if config.tie_word_embeddings:
        return Embed(config).apply({"params": params["embed"]}, x, method="attend")[0, 0]  # type: ignore[index]
    return Head(config).apply({"params": params["lm_head"]}, x)[0, 0]  # type: ignore[index]
