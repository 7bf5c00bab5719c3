"""Text generation with a cache: greedy, temperature or top-p, for ragged batches, compiled once."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache
from effjax.models.decoder import new_cache

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
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """Continues every prompt until a stop token or `max_new_tokens`.

    One program is compiled for each combination of `apply`, shapes, `max_new_tokens`, `stop_tokens`, and of drawing or
    not; parameters, prompts, temperature, mass and key may change freely. A row gives the same tokens alone as in any
    batch, when drawing provided that it has the same key.

    Args:
        apply: `apply({"params": params}, tokens, cache=cache, lengths=lengths) -> (logits, cache)`, as `model.apply` or
            `ej.lift(model.apply)`. Pass the same object again to reuse the compiled program.
        params: what `apply` takes, compressed or not.
        cache: what came before the prompts, usually an empty `new_cache(...)`.
        prompt_tokens: int32 `[batch, length]`, right padded.
        prompt_lengths: int32 `[batch]`, valid tokens of each row, at least 1.
        max_new_tokens: the most tokens to write.
        temperature: 0 takes the likeliest token; above 0 draws from `softmax(logits / temperature)`.
        top_p: draws only from the smallest set of likeliest tokens that together hold this probability.
        key: needed to draw; one key, or `[batch]` keys, one a row. A single key gives row `b` `fold_in(key, b)`.
        stop_tokens: a row ends with the first of these that it writes.
        donate_cache: lets the program reuse the memory of `cache`, which cannot be used afterwards.

    Returns:
        New tokens, int32 `[batch, max_new_tokens]`, and how many of them each row wrote, int32 `[batch]`, its stop
        token included. What stands behind is 0.

    Raises:
        ConfigError: an argument out of range, or a cache without room for prompts and new tokens. (The room is checked
            wherever the lengths are known; inside an outer `jit` they are not, and the caller must know.)

    Source: top-p is nucleus sampling, Holtzman et al. (2020).
    """
    _check(cache, prompt_tokens, prompt_lengths, max_new_tokens, temperature, top_p, key, stop_tokens)
    batch = prompt_tokens.shape[0]
    draw = temperature > 0
    if draw:
        assert key is not None  # _check
        keys = key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    else:
        keys = None
    run = _run_donated if donate_cache else _run
    tokens, lengths, _ = run(
        params,
        cache,
        jnp.asarray(prompt_tokens, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        keys,
        jnp.float32(temperature if draw else 1.0),
        jnp.float32(top_p) if top_p < 1 else None,
        apply=apply,
        max_new_tokens=max_new_tokens,
        stop_tokens=tuple(int(token) for token in stop_tokens),
    )
    return tokens, lengths


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


def _generate(
    params: PyTree,
    cache: KVCache,
    prompt_tokens: Array,
    prompt_lengths: Array,
    keys: Array | None,
    temperature: Array,
    top_p: Array | None,
    *,
    apply: Callable[..., Any],
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
) -> tuple[Array, Array, KVCache]:
    batch = prompt_tokens.shape[0]

    def choose(logits: Array, step: Array) -> Array:
        step_keys = None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        return choose_token(logits, step_keys, temperature, top_p)

    def is_stop(token: Array) -> Array:
        return (
            jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(token.shape, jnp.bool_)
        )

    logits, cache = apply({"params": params}, prompt_tokens, cache=cache, lengths=prompt_lengths)
    last = jnp.take_along_axis(logits, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
    token = choose(last, jnp.int32(0))
    written = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, is_stop(token), written, jnp.ones((batch,), jnp.int32), cache)

    def proceed(state: Any) -> Array:
        step, _, done, *_ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state: Any) -> Any:
        step, token, done, written, lengths, cache = state
        going = (~done).astype(jnp.int32)
        logits, cache = apply({"params": params}, token[:, None], cache=cache, lengths=going)
        token = choose(logits[:, 0], step) * going
        written = jax.lax.dynamic_update_slice(written, token[:, None], (jnp.int32(0), step))
        return step + 1, token, done | is_stop(token), written, lengths + going, cache

    _, _, _, written, lengths, cache = jax.lax.while_loop(proceed, advance, state)
    return written, lengths, cache


_STATIC = ("apply", "max_new_tokens", "stop_tokens")
_run = jax.jit(_generate, static_argnames=_STATIC)
_run_donated = jax.jit(_generate, static_argnames=_STATIC, donate_argnames="cache")


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

    Returns:
        The continuations without prompts and without stop tokens.

    Raises:
        ConfigError: no tokenizer, no or empty prompts, or an argument out of range.
    """
    if isinstance(prompts, str) or not prompts:
        raise ConfigError("generate_text: prompts must be a list of at least one text")
    stops = model.config.eos_token_ids if stop_tokens is None else tuple(stop_tokens)
    encoded = [model.encode(text) for text in prompts]
    for text, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ConfigError(
                f"generate_text: prompt {text!r} has no token, and the model has no first token of its own"
            )
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    padded = _PAD_TO * math.ceil(lengths.max() / _PAD_TO)
    tokens = np.zeros((len(encoded), padded), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    written, counts = generate(
        model.apply if apply is None else apply,
        model.params if params is None else params,
        new_cache(model.config, batch=len(encoded), slots=padded + max(max_new_tokens, 1), dtype=_cache_dtype(model)),
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        stop_tokens=stops,
        donate_cache=True,
    )
    texts = []
    for prompt, row, count in zip(encoded, np.asarray(written), np.asarray(counts), strict=True):
        ids = row[:count].tolist()
        ids = ids[:-1] if ids[-1] in stops else ids
        head, whole = model.decode(prompt), model.decode(prompt + ids)  # alone, a first space would be lost
        texts.append(whole[len(head) :] if whole.startswith(head) else model.decode(ids))
    return texts


def _cache_dtype(model: "LoadedModel") -> Any:
    return model.config.dtype or model.params["embed"]["embedding"].dtype


def _check(
    cache: KVCache,
    prompt_tokens: Any,
    prompt_lengths: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: Any,
    stop_tokens: Sequence[int],
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
    if any(isinstance(x, Tracer) for x in (prompt_lengths, cache.length)):
        return
    lengths = np.asarray(prompt_lengths)
    if lengths.min() < 1 or lengths.max() > prompt_tokens.shape[1]:
        raise ConfigError(
            f"generate: prompt_lengths must be from 1 to {prompt_tokens.shape[1]} (the padded length), found {lengths}"
        )
    filled = np.asarray(cache.length).max(axis=(0, 2))
    needed = int((filled + lengths).max()) + max_new_tokens - 1
    if needed > cache.slots:
        raise ConfigError(
            f"generate: the cache has {cache.slots} slots, but prompts and {max_new_tokens} new tokens need {needed}; "
            f"make it with slots={needed}, or effjax.kv.cache.resize(cache, {needed})"
        )
