"""Text generation with a cache: greedy, temperature or top-p, for ragged batches, compiled once."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache, resize
from effjax.kv.coders import KVCoders
from effjax.kv.evict import check_importance, make_room
from effjax.kv.method import EvictionMethod
from effjax.kv.nomad_slots import NomadLayers
from effjax.models.decoder import new_cache
from effjax.models.generate_evicting import (
    EvictionPlan,
    check_room,
    new_evicting_cache,
    plan_eviction,
    prefill_by_chunks,
)

if TYPE_CHECKING:
    from effjax.models.hf import LoadedModel

PyTree = Any
_PAD_TO = 32  # prompts of similar length share one compiled program


def generate(
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
    donate_cache: bool = False,
    kv: EvictionMethod | None = None,
    prefill_chunk: int | None = None,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """Continues every prompt until a stop token or `max_new_tokens`.

    Two programs are compiled, one for the prompts and one that loops over the new tokens on the device, for each
    combination of `apply`, shapes, `max_new_tokens`, `stop_tokens`, and of drawing or not; parameters, prompts,
    temperature, mass and key may change freely. A row gives the same tokens alone as in any batch, when drawing
    provided that it has the same key.

    Args:
        apply: `apply({"params": params}, tokens, cache=cache, lengths=lengths) -> (logits, cache)`, as `model.apply` or
            `ej.lift(model.apply)`; for prompts with `last_only=True` besides, which asks for the logits
            `[batch, 1, vocab]` of each row's last token. Pass the same object again to reuse the compiled programs.
        params: what `apply` takes, compressed or not.
        cache: what came before the prompts, usually an empty `new_cache(...)`; where layers are not scanned,
            `new_cache(..., split=True)` decodes fastest.
        prompt_tokens: int32 `[batch, length]`, right padded.
        prompt_lengths: int32 `[batch]`, valid tokens of each row, at least 1.
        max_new_tokens: the most tokens to write.
        temperature: 0 takes the likeliest token; above 0 draws from `softmax(logits / temperature)`.
        top_p: draws only from the smallest set of likeliest tokens that together hold this probability.
        key: needed to draw; one key, or `[batch]` keys, one a row. A single key gives row `b` `fold_in(key, b)`.
        stop_tokens: a row ends with the first of these that it writes.
        donate_cache: lets the program reuse the memory of `cache`, which cannot be used afterwards.
        kv: evicts from the cache: the prompt runs in chunks and the cache is brought down to the budget behind each;
            behind the prompt it is cut to the budget, and a full row then loses some tokens at a time. Make the cache
            with `new_evicting_cache`. A share as budget is one of the padded prompts and new tokens together.
        prefill_chunk: tokens of a chunk, with `kv`; None takes the prompt whole.

    Returns:
        New tokens, int32 `[batch, max_new_tokens]`, and how many of them each row wrote, int32 `[batch]`, its stop
        token included. What stands behind is 0.

    Raises:
        ConfigError: an argument out of range, or a cache without room for prompts and new tokens. (The room is checked
            wherever the lengths are known; inside an outer `jit` they are not, and the caller must know.)

    Source: top-p is nucleus sampling, Holtzman et al. (2020).
    """
    plan = plan_eviction(kv, prompt_tokens.shape, max_new_tokens, prefill_chunk)
    check(cache, prompt_tokens, prompt_lengths, max_new_tokens, temperature, top_p, key, stop_tokens, plan)
    draw = drawing(prompt_tokens.shape[0], temperature=temperature, top_p=top_p, key=key)
    stops = tuple(int(token) for token in stop_tokens)
    prefill = prefill_donated if donate_cache else _prefill_kept
    prompts = jnp.asarray(prompt_tokens, jnp.int32), jnp.asarray(prompt_lengths, jnp.int32)
    fixed = {"apply": apply, "stop_tokens": stops, "plan": plan}
    state = prefill(params, cache, *prompts, draw, max_new_tokens=max_new_tokens, **fixed)
    if plan is not None:
        state = cut_to_budget(state, plan=plan)
    state = decode_donated(params, state, draw, **fixed)
    return state.written, state.counts


def choose_token(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"] | None,
    temperature: Float[Array, ""] | float = 1.0,
    top_p: Float[Array, ""] | float | None = None,
) -> Int[Array, " batch"]:
    """The next token of each row: the likeliest without keys, else drawn at `temperature` within the `top_p` mass."""
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p is None:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    mass = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    first = jax.lax.broadcasted_iota(jnp.int32, ranked.shape, 1) == 0
    ranked = jnp.where((before < top_p) | first, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


class State(NamedTuple):
    """What a step of decoding takes and gives: all but the cache are small.

    `step` tokens of each row are written in `written` `[batch, max_new_tokens]`, `token` is the last of them; `done`
    rows have met a stop token, and `counts` holds how many tokens they wrote.
    """

    step: Array
    token: Array
    done: Array
    written: Array
    counts: Array
    cache: KVCache


class Draw(NamedTuple):
    """How tokens are chosen; `keys` are `[batch]`, or None for the likeliest. See `choose_token`."""

    keys: Array | None
    temperature: Array
    top_p: Array | None

    def choose(self, logits: Array, step: Array) -> Array:
        keys = None if self.keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys, step)
        return choose_token(logits, keys, self.temperature, self.top_p)


def drawing(batch: int, *, temperature: float, top_p: float, key: Array | None) -> Draw:
    """The choice that the arguments of `generate` ask for."""
    if not temperature > 0:
        return Draw(keys=None, temperature=jnp.float32(1.0), top_p=jnp.float32(top_p) if top_p < 1 else None)
    assert key is not None  # check
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    return Draw(keys=keys, temperature=jnp.float32(temperature), top_p=jnp.float32(top_p) if top_p < 1 else None)


def is_stop(token: Array, stop_tokens: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(token.shape, jnp.bool_)


def prefill(
    params: PyTree,
    cache: KVCache,
    prompt_tokens: Array,
    prompt_lengths: Array,
    draw: Draw,
    *,
    apply: Callable[..., Any],
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    plan: EvictionPlan | None,
) -> State:
    """The prompts and the first token of each row."""
    batch = prompt_tokens.shape[0]
    if plan is None:
        logits, cache = apply({"params": params}, prompt_tokens, cache=cache, lengths=prompt_lengths, last_only=True)
    else:
        logits, cache = prefill_by_chunks(apply, params, cache, prompt_tokens, prompt_lengths, plan)
    token = draw.choose(logits[:, 0], jnp.int32(0))
    written = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token)
    return State(
        step=jnp.int32(1),
        token=token,
        done=is_stop(token, stop_tokens),
        written=written,
        counts=jnp.ones((batch,), jnp.int32),
        cache=cache,
    )


def _decode(
    params: PyTree,
    state: State,
    draw: Draw,
    *,
    apply: Callable[..., Any],
    stop_tokens: tuple[int, ...],
    plan: EvictionPlan | None,
) -> State:
    """All further tokens: one loop on the device, whose state stays in place."""

    def step(state: State) -> State:
        if plan is not None:
            state = state._replace(cache=make_room(state.cache, plan.method, plan.length))
        return advance(state, draw, stop_tokens, partial(apply, {"params": params}))

    return jax.lax.while_loop(unfinished, step, state)


def unfinished(state: State) -> Array:
    """Whether some row has tokens to write."""
    return (state.step < state.written.shape[1]) & ~jnp.all(state.done)


def advance(state: State, draw: Draw, stop_tokens: tuple[int, ...], run: Callable[..., Any]) -> State:
    """A step of decoding; `run(tokens, cache=, lengths=)` gives the logits of the last tokens, and the cache."""
    going = (~state.done).astype(jnp.int32)
    logits, cache = run(state.token[:, None], cache=state.cache, lengths=going)
    token = draw.choose(logits[:, 0], state.step) * going
    return State(
        step=state.step + 1,
        token=token,
        done=state.done | is_stop(token, stop_tokens),
        written=jax.lax.dynamic_update_slice(state.written, token[:, None], (jnp.int32(0), state.step)),
        counts=state.counts + going,
        cache=cache,
    )


def _cut_to_budget(state: State, *, plan: EvictionPlan) -> State:
    """Gives back the slots in which chunks of the prompt were.

    A program of its own: as a part of the prompts' one it would keep that from reusing the memory of the given cache,
    whose arrays are larger than those it would give.
    """
    return state._replace(cache=resize(state.cache, plan.decode_slots(state.cache.layers)))


_DECODE_STATIC = ("apply", "stop_tokens", "plan")
_PREFILL_STATIC = (*_DECODE_STATIC, "max_new_tokens")
_prefill_kept = jax.jit(prefill, static_argnames=_PREFILL_STATIC)
prefill_donated = jax.jit(prefill, static_argnames=_PREFILL_STATIC, donate_argnames="cache")
cut_to_budget = jax.jit(_cut_to_budget, static_argnames="plan")
decode_donated = jax.jit(_decode, static_argnames=_DECODE_STATIC, donate_argnames="state")


def generate_text(
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
) -> list[str]:
    """Continues texts.

    Args:
        model: configuration, parameters and tokenizer.
        prompts: texts, each of at least one token (the model's own first token counts, where it has one).
        max_new_tokens: the most tokens to write after each.
        temperature: see `generate`.
        top_p: see `generate`.
        seed: of the draws; prompt `i` draws with `fold_in(key(seed), i)`.
        stop_tokens: token ids that end a text; None takes the model's own.
        apply: runs instead of the model's own, as `ej.lift(model.apply)`.
        params: run instead of the model's own, as compressed ones (which need a lifted `apply`).
        kv: evicts from the cache, see `generate`.
        prefill_chunk: see `generate`.
        coders: the cache holds codes by these (`effjax.kv.coders.fit_layers`), with or without `kv`.

    Returns:
        The continuations without prompts and without stop tokens.

    Raises:
        ConfigError: no tokenizer, no or empty prompts, or an argument out of range.
    """
    text = encode_prompts(model, prompts, max_new_tokens, kv, prefill_chunk, coders)
    stops = model.config.eos_token_ids if stop_tokens is None else tuple(stop_tokens)
    written, counts = generate(
        model.apply if apply is None else apply,
        model.params if params is None else params,
        text.cache,
        text.tokens,
        text.lengths,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        stop_tokens=stops,
        donate_cache=True,
        kv=kv,
        prefill_chunk=prefill_chunk,
    )
    return decode_texts(model, text.ids, written, counts, stops)


class Prompts(NamedTuple):
    """Texts ready for `generate`: their token ids, the same padded to one length, and an empty cache with room."""

    ids: list[list[int]]
    tokens: Array
    lengths: Array
    cache: KVCache


def encode_prompts(
    model: "LoadedModel",
    prompts: Sequence[str],
    max_new_tokens: int,
    kv: EvictionMethod | None = None,
    prefill_chunk: int | None = None,
    coders: KVCoders | NomadLayers | None = None,
) -> Prompts:
    """The arguments of `generate` for texts; see `generate_text`."""
    if isinstance(prompts, str) or not prompts:
        raise ConfigError("generate_text: prompts must be a list of at least one text")
    encoded = [model.encode(text) for text in prompts]
    for text, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ConfigError(
                f"generate_text: prompt {text!r} has no token, and the model has no first token of its own"
            )
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    longest, limit = int(lengths.max()), model.config.max_position_embeddings
    if model.config.is_opt and longest + max_new_tokens > limit:  # beyond its table there are no positions
        raise ConfigError(
            f"generate_text: {longest} tokens of a prompt and {max_new_tokens} new ones are more than the {limit} "
            f"positions that {model.source} has; shorten the prompt or ask for fewer"
        )
    padded = _PAD_TO * math.ceil(longest / _PAD_TO)
    tokens = np.zeros((len(encoded), padded), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    dtype = model.config.dtype or model.params["embed"]["embedding"].dtype
    new = max(max_new_tokens, 1)
    options: dict[str, Any] = {"dtype": dtype, "coders": coders}
    if kv is None:
        split = not model.config.scan_layers
        cache = new_cache(model.config, batch=len(encoded), slots=padded + new, split=split, **options)
    else:
        sizes: dict[str, Any] = {"prompts": tokens.shape, "max_new_tokens": new, "prefill_chunk": prefill_chunk}
        cache = new_evicting_cache(model.config, kv, **sizes, **options)
    return Prompts(ids=encoded, tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths), cache=cache)


def decode_texts(
    model: "LoadedModel", prompts: list[list[int]], written: Any, counts: Any, stop_tokens: Sequence[int]
) -> list[str]:
    """The continuations as texts, without prompts and without stop tokens."""
    texts = []
    for prompt, row, count in zip(prompts, np.asarray(written), np.asarray(counts), strict=True):
        ids = row[:count].tolist()
        ids = ids[:-1] if ids[-1] in stop_tokens else ids
        head, whole = model.decode(prompt), model.decode(prompt + ids)  # alone, a first space would be lost
        texts.append(whole[len(head) :] if whole.startswith(head) else model.decode(ids))
    return texts


def check(
    cache: KVCache,
    prompt_tokens: Any,
    prompt_lengths: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: Any,
    stop_tokens: Sequence[int],
    plan: EvictionPlan | None = None,
) -> None:
    if prompt_tokens.ndim != 2 or 0 in prompt_tokens.shape or prompt_lengths.shape != prompt_tokens.shape[:1]:
        raise ConfigError(
            f"generate: prompt_tokens must be [batch, length] and prompt_lengths [batch], found "
            f"{list(prompt_tokens.shape)} and {list(prompt_lengths.shape)}"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"generate: max_new_tokens must be a whole number of at least 1, found {max_new_tokens!r}")
    if not (0 <= temperature < math.inf):
        raise ConfigError(
            f"generate: temperature must be 0 (greedy) or a finite positive number, found {temperature!r}"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"generate: top_p must be above 0 and at most 1, found {top_p!r}")
    if temperature > 0 and key is None:
        raise ConfigError("generate: drawing at a temperature needs a key; write key=jax.random.key(seed)")
    if key is not None and key.shape not in ((), prompt_tokens.shape[:1]):
        raise ConfigError(
            f"generate: key must be one jax.random.key or one a row ([{prompt_tokens.shape[0]}]), found "
            f"{list(key.shape)}"
        )
    if any(not isinstance(token, int | np.integer) or token < 0 for token in stop_tokens):
        raise ConfigError(f"generate: stop_tokens must be token ids, found {tuple(stop_tokens)!r}")
    if plan is not None:
        check_importance("generate", cache, plan.method)
    if any(isinstance(x, Tracer) for x in (prompt_lengths, cache.length)):
        return
    lengths = np.asarray(prompt_lengths)
    if lengths.min() < 1 or lengths.max() > prompt_tokens.shape[1]:
        raise ConfigError(
            f"generate: prompt_lengths must be from 1 to {prompt_tokens.shape[1]} (the padded length), found {lengths}"
        )
    if plan is not None:
        check_room(cache, plan)
        return
    filled = np.asarray(cache.length).max(axis=(0, 2))
    needed = int((filled + lengths).max()) + max_new_tokens - 1
    if needed > cache.slots:
        raise ConfigError(
            f"generate: the cache has {cache.slots} slots, but prompts and {max_new_tokens} new tokens need {needed}; "
            f"make it with slots={needed}, or effjax.kv.cache.resize(cache, {needed})"
        )
