"""Generation within a cache budget: what is kept, the cache for it, and prompts that run in chunks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache
from effjax.kv.checks import check_whole
from effjax.kv.coders import KVCoders
from effjax.kv.evict import evict_to
from effjax.kv.importance import ATTENTION_RECEIVED
from effjax.kv.method import EvictionMethod
from effjax.kv.nomad_slots import NomadLayers
from effjax.models.config import DecoderConfig
from effjax.models.decoder import new_cache

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictionPlan:
    """A method for prompts and new tokens of known number; hashable, a static argument of the compiled programs.

    Attributes:
        method: with a budget in whole tokens.
        chunk: tokens of a prompt that run at once.
        length: of the padded prompts and new tokens; no layer needs more slots.
    """

    method: EvictionMethod
    chunk: int
    length: int

    def decode_slots(self, layers: int) -> tuple[int, ...]:
        """Of each layer while decoding."""
        return tuple(min(budget, self.length) for budget in self.method.layer_budgets(layers))

    def prefill_slots(self, layers: int) -> tuple[int, ...]:
        """Of each layer while prompts run: its budget, and room for a chunk."""
        return tuple(min(budget + self.chunk, self.length) for budget in self.method.layer_budgets(layers))


def plan_eviction(
    kv: EvictionMethod | None, prompts: tuple[int, ...], max_new_tokens: int, prefill_chunk: int | None
) -> EvictionPlan | None:
    """The plan of `generate`'s arguments; None without a method.

    Raises:
        ConfigError: a chunk below 1, or a chunk without a method.
    """
    if prefill_chunk is not None:
        check_whole("generate", "prefill_chunk", prefill_chunk, 1)
    if kv is None:
        if prefill_chunk is not None:
            raise ConfigError("generate: prefill_chunk needs a method that evicts, as kv=ej.kv.H2O(budget=0.2)")
        return None
    padded = prompts[1]
    length = padded + max_new_tokens
    return EvictionPlan(method=kv.resolve(length), chunk=min(prefill_chunk or padded, padded), length=length)


def new_evicting_cache(
    config: DecoderConfig,
    kv: EvictionMethod,
    *,
    prompts: tuple[int, int],
    max_new_tokens: int,
    prefill_chunk: int | None = None,
    dtype: Any = None,
    coders: KVCoders | NomadLayers | None = None,
) -> KVCache:
    """An empty cache for `generate(..., kv=kv, prefill_chunk=prefill_chunk)`: the budget, and room for a chunk.

    Args:
        config: of the decoder.
        kv: the method.
        prompts: shape of the prompts, `[batch, length]`.
        max_new_tokens, prefill_chunk: as of `generate`.
        dtype: of keys and values; defaults to the one computed in.
        coders: what is kept is held as codes, see `effjax.models.decoder.new_cache`.

    Raises:
        ConfigError: a budget that does not fit the model's layers, or layers of different budgets in a model that scans
            over them.

    Example:
        >>> from effjax.kv import Scissorhands
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> new_evicting_cache(
        ...     config, Scissorhands(budget=0.25), prompts=(1, 160), max_new_tokens=96, prefill_chunk=32
        ... ).layer_slots
        (96, 96)
    """
    plan = plan_eviction(kv, prompts, max_new_tokens, prefill_chunk)
    assert plan is not None
    slots = plan.prefill_slots(config.num_hidden_layers)
    kept = plan.decode_slots(config.num_hidden_layers)
    if config.scan_layers and len({*slots}) + len({*kept}) > 2:
        raise ConfigError(
            f"generate: layers keep {kept} tokens, but this model scans over its layers, which must be alike; unroll "
            "it (scan_layers=False, effjax.models.decoder.unstack_layers) or give all layers one budget"
        )
    return new_cache(
        config,
        batch=prompts[0],
        slots=slots if len(set(slots)) > 1 else slots[0],
        dtype=dtype,
        split=not config.scan_layers,
        importance=kv.importance or ATTENTION_RECEIVED,
        coders=coders,
    )


def check_room(cache: KVCache, plan: EvictionPlan) -> None:
    """Refuses a cache without room for a chunk beside the budget, one that holds tokens, or too small a budget."""
    for layer, (found, kept) in enumerate(
        zip(plan.prefill_slots(cache.layers), plan.decode_slots(cache.layers), strict=True)
    ):
        if cache.layer_slots[layer] < found:
            raise ConfigError(
                f"generate: layer {layer} of the cache has {cache.layer_slots[layer]} slots, but the budget and a "
                f"chunk of {plan.chunk} prompt tokens need {found}; make the cache with "
                "effjax.models.generate_evicting.new_evicting_cache"
            )
        if kept < plan.length:
            plan.method.of_layer(layer, cache.layers).make_room(kept)
    if (held := int(np.asarray(cache.length).max())) > 0:
        raise ConfigError(
            f"generate: with kv the cache must be empty, found {held} tokens in it; give the whole text as the prompt"
        )


def prefill_by_chunks(
    apply: Callable[..., Any],
    params: PyTree,
    cache: KVCache,
    prompt_tokens: Int[Array, "batch length"],
    prompt_lengths: Int[Array, " batch"],
    plan: EvictionPlan,
) -> tuple[Float[Array, "batch 1 vocab"], KVCache]:
    """Logits behind the prompts and the cache brought down to the budget, in as many slots as before.

    The first chunks are one compiled loop, however many; the last one gives the logits.

    Chunks of a row are counted from its end, so that the last one of every row is whole and holds its last token: what
    the last queries of a prompt say is then there at its last eviction, and a row alone is cut as it is in a batch.
    """
    batch, length = prompt_tokens.shape
    chunk = plan.chunk
    count = math.ceil(length / chunk)
    step = jax.lax.broadcasted_iota(jnp.int32, (batch, chunk), 1)

    def one(i: Array | int, cache: KVCache) -> tuple[Array, KVCache]:
        begin, end = (prompt_lengths - (count - i - back) * chunk for back in (0, 1))
        begin, end = jnp.maximum(begin, 0), jnp.maximum(end, 0)
        at = jnp.minimum(begin[:, None] + step, length - 1)
        tokens = jnp.take_along_axis(prompt_tokens, at, axis=1)
        return apply({"params": params}, tokens, cache=cache, lengths=end - begin, last_only=True)

    budgets, slots = plan.decode_slots(cache.layers), cache.layer_slots

    def next_chunk(i: Array, cache: KVCache) -> KVCache:
        return evict_to(one(i, cache)[1], plan.method, budgets, slots)

    if count > 1:
        cache = jax.lax.fori_loop(0, count - 1, next_chunk, cache)
    logits, cache = one(count - 1, cache)
    return logits, evict_to(cache, plan.method, budgets, slots)
