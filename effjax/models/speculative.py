"""Speculative decoding: a fast model drafts a few tokens, the model itself checks them in one pass.

Sources: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (ICML 2023), algorithm 1; Chen et
al., Accelerating Large Language Model Decoding with Speculative Sampling (2023).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache
from effjax.kv.rollback import drop_last
from effjax.models.decoder import new_cache
from effjax.models.generate import check, decode_texts, drawing, encode_prompts, is_stop

if TYPE_CHECKING:
    from effjax.models.hf import LoadedModel

PyTree = Any


class Model(NamedTuple):
    """A decoder with its parameters and an empty cache.

    Attributes:
        apply: see `effjax.models.generate.generate`; the same object again reuses the compiled program.
        params: what it takes, compressed or not.
        cache: with room for prompts, new tokens and drafts: `new_cache(config, batch=, slots=, split=True)`.
    """

    apply: Callable[..., Any]
    params: PyTree
    cache: KVCache


class Speculated(NamedTuple):
    """What `generate_speculative` gives.

    Attributes:
        tokens: new tokens, 0 behind a row's last one.
        counts: of them in each row, a stop token included.
        passes: of the checking model that each row took, the prompt's included: `counts / passes` tokens came of each.
    """

    tokens: Int[Array, "batch new"]
    counts: Int[Array, " batch"]
    passes: Int[Array, " batch"]


class _State(NamedTuple):
    """`token` is each row's last one, which no cache holds yet."""

    token: Array
    done: Array
    written: Array
    counts: Array
    passes: Array
    cache: KVCache
    draft_cache: KVCache


def generate_speculative(
    model: Model,
    draft: Model,
    prompt_tokens: Int[Array, "batch length"],
    prompt_lengths: Int[Array, " batch"],
    *,
    draft_tokens: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Key[Array, "*batch"] | None = None,
    stop_tokens: Sequence[int] = (),
) -> Speculated:
    """Continues prompts as `model` does by itself, in fewer passes of it.

    The draft model writes `draft_tokens` tokens, one by one; `model` reads them in one pass and keeps those that it
    would have written. Greedy: its own tokens, up to ties of rounded logits. Drawing: tokens of its own distribution,
    but others than `generate` draws with the same key. The draft may be the model compressed.

    Args:
        model: whose text it is.
        draft: with the same tokens.
        prompt_tokens, prompt_lengths, max_new_tokens, temperature, top_p, key, stop_tokens: see
            `effjax.models.generate.generate`; both models draw at this temperature and within this mass.
        draft_tokens: that are checked at once.

    Raises:
        ConfigError: what `generate` refuses; no draft tokens; a cache without room for `draft_tokens` more than
            prompts and new tokens, or one that holds codes; models of different vocabularies.

    Example:
        >>> import effjax as ej
        >>> from effjax.models.decoder import new_cache
        >>> from effjax.models.embedded import load_default
        >>> loaded = load_default(dtype="float32")
        >>> prompts, lengths = jnp.asarray([loaded.encode("A list is")]), jnp.array([len(loaded.encode("A list is"))])
        >>> def made(apply, params):
        ...     return Model(apply, params, new_cache(loaded.config, batch=1, slots=64, split=True))
        >>> small = ej.quantize_params(loaded.params, ej.quantize.RTN(bits=8))
        >>> found = generate_speculative(made(loaded.apply, loaded.params), made(ej.lift(loaded.apply), small),
        ...                              prompts, lengths, draft_tokens=4, max_new_tokens=20)
        >>> int(found.counts[0]), int(found.passes[0]) < 12
        (20, True)
    """
    if not isinstance(draft_tokens, int) or draft_tokens < 1:
        raise ConfigError(f"generate_speculative: draft_tokens must be a whole number, at least 1: {draft_tokens!r}")
    for whose, of in (("model", model), ("draft", draft)):
        check(of.cache, prompt_tokens, prompt_lengths, max_new_tokens, temperature, top_p, key, stop_tokens)
        if of.cache.is_coded:
            raise ConfigError(f"generate_speculative: the cache of {whose} holds codes; make it without coders")
        _check_room(whose, of.cache, prompt_lengths, max_new_tokens + draft_tokens)
    draw = drawing(prompt_tokens.shape[0], temperature=temperature, top_p=top_p, key=key)
    return _run(
        (model.params, draft.params),
        (model.cache, draft.cache),
        jnp.asarray(prompt_tokens, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        draw,
        applies=(model.apply, draft.apply),
        draft_tokens=draft_tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=tuple(int(token) for token in stop_tokens),
    )


def probabilities(
    logits: Float[Array, "*batch vocab"], temperature: Float[Array, ""] | float, top_p: Float[Array, ""] | float | None
) -> Float[Array, "*batch vocab"]:
    """Of the tokens that `effjax.models.generate.choose_token` draws.

    Example:
        >>> probabilities(jnp.log(jnp.array([0.5, 0.25, 0.25])), 1.0, 0.5).tolist()
        [1.0, 0.0, 0.0]
    """
    probs = jax.nn.softmax(logits / temperature, axis=-1)
    if top_p is None:
        return probs
    order = jnp.argsort(-probs, axis=-1)
    ranked = jnp.take_along_axis(probs, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    first = jax.lax.broadcasted_iota(jnp.int32, ranked.shape, ranked.ndim - 1) == 0
    ranked = jnp.where((before < top_p) | first, ranked, 0.0)
    kept = jnp.put_along_axis(jnp.zeros_like(probs), order, ranked, axis=-1, inplace=False)
    return kept / kept.sum(-1, keepdims=True)


def accept(
    keys: Key[Array, " batch"],
    drafted: Int[Array, "batch drafts"],
    theirs: Float[Array, "batch drafts vocab"],
    ours: Float[Array, "batch passes vocab"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """How many drafted tokens a row keeps, and the token behind them, so that all are draws of `ours`.

    Args:
        keys: one a row.
        drafted: drawn from `theirs`.
        theirs: the draft model's distributions.
        ours: the model's own at the same places, and at the one behind.

    Source: Leviathan et al. (2023), algorithm 1.
    """
    count = drafted.shape[1]
    split = jax.vmap(partial(jax.random.split, num=2))(keys)
    p, q = (jnp.take_along_axis(d[:, :count], drafted[..., None], axis=-1)[..., 0] for d in (ours, theirs))
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (count,)))(split[:, 0])
    kept = _leading(uniform * q < p)
    behind = jnp.take_along_axis(ours, kept[:, None, None], axis=1)[:, 0]
    # Behind the last draft nothing was drawn from theirs.
    other = jnp.take_along_axis(jnp.pad(theirs, ((0, 0), (0, 1), (0, 0))), kept[:, None, None], axis=1)[:, 0]
    rest = jnp.maximum(behind - other, 0.0)
    # Where both agree up to rounding, a rejection has nothing left to draw from.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, behind)
    return kept, jax.vmap(jax.random.categorical)(split[:, 1], jnp.log(rest)).astype(jnp.int32)


def _leading(flags: Array) -> Array:
    """How many flags of a row are true before the first that is not."""
    return jnp.cumprod(flags.astype(jnp.int32), axis=1).sum(1)


def _check_room(whose: str, cache: KVCache, prompt_lengths: Any, more: int) -> None:
    if any(isinstance(x, Tracer) for x in (prompt_lengths, cache.length)):
        return
    needed = int((np.asarray(cache.length).max(axis=(0, 2)) + np.asarray(prompt_lengths)).max()) + more
    if needed > cache.slots:
        raise ConfigError(
            f"generate_speculative: the cache of {whose} has {cache.slots} slots, but prompts, new tokens and drafts "
            f"need {needed}; make it with slots={needed}"
        )


@partial(jax.jit, static_argnames=("applies", "draft_tokens", "max_new_tokens", "stop_tokens"))
def _run(
    params: tuple[PyTree, PyTree],
    caches: tuple[KVCache, KVCache],
    prompt_tokens: Array,
    prompt_lengths: Array,
    draw: Any,
    *,
    applies: tuple[Callable[..., Any], Callable[..., Any]],
    draft_tokens: int,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
) -> Speculated:
    batch = prompt_tokens.shape[0]
    model, draft = (partial(apply, {"params": p}) for apply, p in zip(applies, params, strict=True))
    prompts = {"lengths": prompt_lengths, "last_only": True}
    logits, cache = model(prompt_tokens, cache=caches[0], **prompts)
    theirs, draft_cache = draft(prompt_tokens, cache=caches[1], **prompts)
    if theirs.shape[-1] != logits.shape[-1]:
        raise ConfigError(
            f"generate_speculative: the draft has {theirs.shape[-1]} tokens and the model {logits.shape[-1]}; both "
            "must share a tokenizer"
        )
    token = draw.choose(logits[:, 0], jnp.int32(0))
    written = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token)
    ones = jnp.ones(batch, jnp.int32)
    state = _State(token, is_stop(token, stop_tokens), written, ones, ones, cache, draft_cache)

    def going(state: _State) -> Array:
        return (~state.done & (state.counts < max_new_tokens)).astype(jnp.int32)

    def keys_of(state: _State, place: Array) -> Array | None:
        """Other ones for every token of the text and every use."""
        if draw.keys is None:
            return None
        fold = jax.vmap(jax.random.fold_in)
        return fold(fold(draw.keys, state.counts), jnp.broadcast_to(place, batch))

    def write_draft(state: _State) -> tuple[Array, Array, KVCache]:
        def one(carry: Any, place: Array) -> Any:
            token, cache = carry
            logits, cache = draft(token[:, None], cache=cache, lengths=going(state))
            keys, logits = keys_of(state, place), logits[:, 0]
            if keys is None:
                return (jnp.argmax(logits, -1).astype(jnp.int32), cache), (token, logits[:, :0])
            probs = probabilities(logits, draw.temperature, draw.top_p)
            after = jax.vmap(jax.random.categorical)(keys, jnp.log(probs)).astype(jnp.int32)
            return (after, cache), (token, probs)

        # A step more than there are drafts: the last one too has to be in the cache.
        (_, cache), (tokens, probs) = jax.lax.scan(one, (state.token, state.draft_cache), jnp.arange(draft_tokens + 1))
        return tokens.T, probs.swapaxes(0, 1)[:, :draft_tokens], cache

    def turn(state: _State) -> _State:
        active = going(state)
        tokens, theirs, draft_cache = write_draft(state)
        logits, cache = model(tokens, cache=state.cache, lengths=active * (draft_tokens + 1))
        drafted, keys = tokens[:, 1:], keys_of(state, jnp.int32(draft_tokens + 1))
        if keys is None:
            best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            kept = _leading(best[:, :-1] == drafted)
            behind = jnp.take_along_axis(best, kept[:, None], axis=1)[:, 0]
        else:
            ours = probabilities(logits, draw.temperature, draw.top_p)
            kept, behind = accept(keys, drafted, theirs, ours)
        place = jnp.arange(draft_tokens + 1)
        new = jnp.where(place < kept[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), behind[:, None])
        stops = is_stop(new, stop_tokens) & (place <= kept[:, None])
        until = jnp.where(stops.any(1), jnp.argmax(stops, axis=1), kept) + 1
        count = active * jnp.minimum(until, max_new_tokens - state.counts)
        at = jnp.where(place < count[:, None], state.counts[:, None] + place, max_new_tokens)
        return _State(
            token=jnp.where(active == 1, behind, state.token),
            done=state.done | (stops & (place < count[:, None])).any(1),
            written=state.written.at[jnp.arange(batch)[:, None], at].set(new, mode="drop"),
            counts=state.counts + count,
            passes=state.passes + active,
            cache=drop_last(cache, active * (draft_tokens - kept)),
            draft_cache=drop_last(draft_cache, active * (draft_tokens - kept)),
        )

    state = jax.lax.while_loop(lambda state: jnp.any(going(state) == 1), turn, state)
    return Speculated(state.written, state.counts, state.passes)


def generate_text_speculative(
    model: "LoadedModel",
    draft: "LoadedModel",
    prompts: Sequence[str],
    *,
    draft_tokens: int = 4,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    apply: Callable[..., Any] | None = None,
    draft_apply: Callable[..., Any] | None = None,
) -> tuple[list[str], Speculated]:
    """`effjax.models.generate.generate_text` with a draft model.

    Args:
        model: whose text it is.
        draft: writes the drafts; with the same tokenizer, which is checked on the prompts.
        draft_tokens: see `generate_speculative`.
        apply, draft_apply: run instead of the models' own, as `ej.lift(model.apply)` for compressed weights.
        prompts, max_new_tokens, temperature, top_p, seed, stop_tokens: see `generate_text`.

    Returns:
        The continuations, and tokens, counts and passes.

    Raises:
        ConfigError: see `generate_text` and `generate_speculative`.
    """
    text = encode_prompts(model, prompts, max_new_tokens + draft_tokens)
    for prompt, ids in zip(prompts, text.ids, strict=True):
        if draft.encode(prompt) != ids:
            raise ConfigError(
                f"generate_text_speculative: {draft.source} encodes {prompt!r} otherwise than {model.source}; a draft "
                "needs the tokenizer of its model"
            )
    stops = model.config.eos_token_ids if stop_tokens is None else tuple(stop_tokens)
    config = draft.config
    cache = new_cache(
        config,
        batch=len(prompts),
        slots=text.cache.slots,
        dtype=config.dtype or draft.params["embed"]["embedding"].dtype,
        split=not config.scan_layers,
    )
    found = generate_speculative(
        Model(model.apply if apply is None else apply, model.params, text.cache),
        Model(draft.apply if draft_apply is None else draft_apply, draft.params, cache),
        text.tokens,
        text.lengths,
        draft_tokens=draft_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        stop_tokens=stops,
    )
    return decode_texts(model, text.ids, found.tokens, found.counts, stops), found
