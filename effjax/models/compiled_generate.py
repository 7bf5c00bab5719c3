"""`generate` compiled ahead of time: its two programs can be looked at, and a run of them is timed."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from effjax.arrays.base import is_compressed
from effjax.kv.cache import KVCache, init_cache
from effjax.kv.coders import KVCoders
from effjax.kv.method import EvictionMethod
from effjax.kv.nomad_slots import NomadLayers
from effjax.models.generate import (
    check,
    cut_to_budget,
    decode_donated,
    decode_texts,
    drawing,
    encode_prompts,
    prefill_donated,
)
from effjax.models.generate_evicting import EvictionPlan, plan_eviction
from effjax.tree import nbytes

if TYPE_CHECKING:
    from effjax.models.hf import LoadedModel

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What one run took. Nothing of it is compilation, which came before.

    Attributes:
        rows: of the batch.
        prompt_tokens: of all rows, padding not counted.
        new_tokens: that all rows wrote, their first ones included.
        steps: of decoding: passes of the model after the prompts, each of which gives every unfinished row a token.
        first_token_s: seconds from the prompts to the first token of every row.
        decode_s: seconds of the other tokens.
        weight_bytes: of the weights that a step reads: all but the token table, of which it reads a row for each of
            its rows, unless the table is the head too.
        cache_bytes: of the cache while decoding: all slots, filled or not, which is the most that a step reads of it.
        cache_slots: of each layer, in every row and head.
        full_cache_bytes: of a cache that holds the padded prompts and all new tokens as they are; None where nothing
            is evicted or coded.

    Example:
        >>> stats = GenerationStats(rows=1, prompt_tokens=5, new_tokens=11, steps=10, first_token_s=0.5, decode_s=2.0,
        ...                         weight_bytes=900, cache_bytes=100)
        >>> stats.tokens_per_second, stats.bytes_per_token, stats.bytes_per_second
        (5.0, 1000.0, 5000.0)
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    first_token_s: float
    decode_s: float
    weight_bytes: int
    cache_bytes: int
    cache_slots: tuple[int, ...] = ()
    full_cache_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all rows while decoding; None where one pass gave all tokens."""
        return (self.new_tokens - self.rows) / self.decode_s if self.steps else None

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.first_token_s

    @property
    def bytes_per_token(self) -> float:
        """Bytes of weights and cache that a step reads, over the tokens that it gives; those of a step without any."""
        written = self.new_tokens - self.rows
        return (self.weight_bytes + self.cache_bytes) * (self.steps / written if written else 1)

    @property
    def bytes_per_second(self) -> float | None:
        """Of weights and cache, read while decoding."""
        return (self.weight_bytes + self.cache_bytes) * self.steps / self.decode_s if self.steps else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledGenerate:
    """The programs of `generate` for given shapes.

    Attributes:
        prefill, decode: `jax.stages.Compiled`, for `memory_analysis()` and `as_text()`.
        compile_s: seconds that tracing and compiling both took.
        max_new_tokens, stop_tokens: as compiled.
        plan: what is evicted; None without a method.
        cut: the program between them that gives back the slots of the prompt's chunks; None without a method.
    """

    prefill: Any
    decode: Any
    compile_s: float
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    plan: EvictionPlan | None = None
    cut: Any = None

    def run(
        self,
        params: PyTree,
        cache: KVCache,
        prompt_tokens: Int[Array, "batch length"],
        prompt_lengths: Int[Array, " batch"],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: Key[Array, "*batch"] | None = None,
    ) -> tuple[Int[Array, "batch new"], Int[Array, " batch"], GenerationStats]:
        """As `generate` with `donate_cache`, and what it took.

        Raises:
            ConfigError: see `generate`.
            TypeError: other shapes than compiled, or drawing where greedy was compiled.
        """
        check(
            cache,
            prompt_tokens,
            prompt_lengths,
            self.max_new_tokens,
            temperature,
            top_p,
            key,
            self.stop_tokens,
            self.plan,
        )
        draw = drawing(prompt_tokens.shape[0], temperature=temperature, top_p=top_p, key=key)
        arguments = params, cache, jnp.asarray(prompt_tokens, jnp.int32), jnp.asarray(prompt_lengths, jnp.int32), draw
        weights = step_bytes(params, rows=prompt_tokens.shape[0])
        length = cache.slots if self.plan is None else self.plan.length
        full = whole_cache_bytes(cache, length) if self.plan is not None or cache.is_coded else None
        jax.block_until_ready(arguments)
        began = time.perf_counter()
        state = self.prefill(*arguments)
        state = state if self.cut is None else self.cut(state)
        jax.block_until_ready(state.token)
        first = time.perf_counter()
        held, slots = state.cache.nbytes, state.cache.layer_slots
        state = self.decode(params, state, draw)
        jax.block_until_ready(state.written)
        ended = time.perf_counter()
        stats = GenerationStats(
            rows=prompt_tokens.shape[0],
            prompt_tokens=int(jnp.sum(arguments[3])),
            new_tokens=int(jnp.sum(state.counts)),
            steps=int(state.step) - 1,
            first_token_s=first - began,
            decode_s=ended - first,
            weight_bytes=weights,
            cache_bytes=held,
            cache_slots=slots,
            full_cache_bytes=full,
        )
        return state.written, state.counts, stats


def compile_generate(
    apply: Callable[..., Any],
    params: PyTree,
    cache: KVCache,
    prompt_tokens: Int[Array, "batch length"],
    prompt_lengths: Int[Array, " batch"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Key[Array, "*batch"] | None = None,
    stop_tokens: Sequence[int] = (),
    kv: EvictionMethod | None = None,
    prefill_chunk: int | None = None,
) -> CompiledGenerate:
    """Compiles what `generate(..., donate_cache=True)` would run with these arguments, and runs nothing.

    Args:
        apply, params, cache, prompt_tokens, prompt_lengths: see `generate`; of arrays only shapes and dtypes matter, so
            `jax.ShapeDtypeStruct` will do for parameters and prompts, and `jax.eval_shape` of a cache for it.
        max_new_tokens, stop_tokens, kv, prefill_chunk: see `generate`; fixed in the programs.
        temperature, top_p, key: whether to draw, and whether within a mass; their values are given anew at every run.

    Example:
        >>> from effjax.models.config import DecoderConfig
        >>> from effjax.models.decoder import Decoder, new_cache
        >>> model = Decoder(DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... ))
        >>> prompts, lengths = jnp.ones((1, 4), jnp.int32), jnp.array([4])
        >>> params = model.init(jax.random.key(0), prompts)["params"]
        >>> cache = new_cache(model.config, batch=1, slots=12, split=True)
        >>> compiled = compile_generate(model.apply, params, cache, prompts, lengths, max_new_tokens=8)
        >>> tokens, counts, stats = compiled.run(params, cache, prompts, lengths)
        >>> tokens.shape, stats.steps
        ((1, 8), 7)
    """
    began = time.perf_counter()
    stops = tuple(int(token) for token in stop_tokens)
    draw = drawing(prompt_tokens.shape[0], temperature=temperature, top_p=top_p, key=key)
    plan = plan_eviction(kv, prompt_tokens.shape, max_new_tokens, prefill_chunk)
    prompts = [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in (prompt_tokens, prompt_lengths)]
    fixed = {"apply": apply, "stop_tokens": stops, "plan": plan}
    lowered = prefill_donated.lower(params, cache, *prompts, draw, max_new_tokens=max_new_tokens, **fixed)
    cut = None if plan is None else cut_to_budget.lower(lowered.out_info, plan=plan)
    decode = decode_donated.lower(params, lowered.out_info if cut is None else cut.out_info, draw, **fixed)
    prefill, decode = lowered.compile(), decode.compile()
    return CompiledGenerate(
        prefill=prefill,
        decode=decode,
        compile_s=time.perf_counter() - began,
        max_new_tokens=max_new_tokens,
        stop_tokens=stops,
        plan=plan,
        cut=None if cut is None else cut.compile(),
    )


def whole_cache_bytes(cache: KVCache, slots: int) -> int:
    """Bytes of a cache like this one, not coded, with `slots` slots in every layer."""
    batch, kv_heads = cache.length.shape[1:]
    sizes = {"layers": cache.layers, "batch": batch, "kv_heads": kv_heads, "slots": slots}
    shapes = jax.eval_shape(lambda: init_cache(**sizes, head_dim=cache.k[0].shape[-1], dtype=cache.k[0].dtype))
    return shapes.nbytes


def step_bytes(params: PyTree, *, rows: int) -> int:
    """Bytes of a decoder's parameters that a step of `rows` rows reads; see `GenerationStats`.

    Example:
        >>> params = {"embed": {"embedding": jnp.ones((100, 8))}, "lm_head": {"kernel": jnp.ones((8, 100))}}
        >>> step_bytes(params, rows=2) == (2 * 8 + 8 * 100) * 4
        True
    """
    total = nbytes(params)
    if "lm_head" not in params or "embed" not in params:
        return total
    tables = jax.tree.leaves(params["embed"], is_leaf=is_compressed)
    looked_up = sum(math.ceil(nbytes(table) / table.shape[0]) * min(rows, table.shape[0]) for table in tables)
    return total - nbytes(params["embed"]) + looked_up


def generate_text_measured(
    model: "LoadedModel",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    apply: Callable[..., Any] | None = None,
    params: PyTree | None = None,
    kv: EvictionMethod | None = None,
    prefill_chunk: int | None = None,
    coders: KVCoders | NomadLayers | None = None,
) -> tuple[list[str], GenerationStats]:
    """`generate_text`, and what it took without compiling.

    Raises:
        ConfigError: see `generate_text`.
    """
    text = encode_prompts(model, prompts, max_new_tokens, kv, prefill_chunk, coders)
    stops = model.config.eos_token_ids if stop_tokens is None else tuple(stop_tokens)
    apply, params = model.apply if apply is None else apply, model.params if params is None else params
    key = jax.random.key(seed)
    arguments = params, text.cache, text.tokens, text.lengths
    plan = plan_eviction(kv, text.tokens.shape, max_new_tokens, prefill_chunk)
    check(text.cache, text.tokens, text.lengths, max_new_tokens, temperature, top_p, key, stops, plan)
    compiled = compile_generate(
        apply,
        *arguments,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=key,
        stop_tokens=stops,
        kv=kv,
        prefill_chunk=prefill_chunk,
    )
    written, counts, stats = compiled.run(*arguments, temperature=temperature, top_p=top_p, key=key)
    return decode_texts(model, text.ids, written, counts, stops), stats
