"""Generation in which every second block of tokens reads those neurons alone that the block before used.

Source: Mirzadeh et al., ReLU Strikes Back (ICLR 2024), section 5.1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache
from effjax.models.config import DecoderConfig
from effjax.models.generate import Draw, State, advance, check, drawing, prefill, unfinished
from effjax.sparsity.by_neuron import chosen_apply, neuron_apply, used_apply

PyTree = Any


class Reused(NamedTuple):
    """What `generate_reusing` gives.

    Attributes:
        tokens: new tokens, 0 behind a row's last one.
        counts: of them in each row, a stop token included.
        share: of each layer's neurons that blocks without loads read, on average; NaN where there was no such block.
    """

    tokens: Int[Array, "batch new"]
    counts: Int[Array, " batch"]
    share: Float[Array, " layers"]


def generate_reusing(
    config: DecoderConfig,
    params: PyTree,
    cache: KVCache,
    prompt_tokens: Int[Array, "batch length"],
    prompt_lengths: Int[Array, " batch"],
    *,
    gamma: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Key[Array, "*batch"] | None = None,
    stop_tokens: Sequence[int] = (),
) -> Reused:
    """`generate` with blocks of `gamma` steps: every neuron, then those of the block before, and so on.

    In the second, fourth, … block neurons that the block before did not use count as zero, so that their rows need not
    be read; what that costs in quality `effjax.sparsity.reuse.reuse_mask` tells. Rows of a batch share the neurons.

    Args:
        config: of a decoder with ReLUs.
        params: of `by_neuron`.
        cache, prompt_tokens, prompt_lengths, max_new_tokens, temperature, top_p, key, stop_tokens: see
            `effjax.models.generate.generate`.
        gamma: steps of a block. The prompt counts to none: it runs with all neurons.

    Raises:
        ConfigError: `gamma` is below 1, a decoder without ReLUs, or what `generate` refuses.

    Example:
        >>> from effjax.models.decoder import Decoder, new_cache
        >>> from effjax.sparsity.by_neuron import by_neuron
        >>> config = DecoderConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                        num_attention_heads=4, hidden_act="relu")
        >>> prompts, lengths = jnp.ones((1, 4), jnp.int32), jnp.array([4])
        >>> params = by_neuron(config, Decoder(config).init(jax.random.key(0), prompts)["params"])
        >>> cache = new_cache(config, batch=1, slots=16, split=True)
        >>> found = generate_reusing(config, params, cache, prompts, lengths, gamma=4, max_new_tokens=12)
        >>> found.tokens.shape, bool((found.share < 1).all())
        ((1, 12), True)
    """
    if gamma < 1:
        raise ConfigError(f"generate_reusing: gamma={gamma}: must be at least 1")
    if config.hidden_act != "relu":
        raise ConfigError(
            f"generate_reusing: hidden_act {config.hidden_act!r} has no neurons at rest; effjax.sparsity.relufy gives "
            "a model ReLUs"
        )
    check(cache, prompt_tokens, prompt_lengths, max_new_tokens, temperature, top_p, key, stop_tokens)
    draw = drawing(prompt_tokens.shape[0], temperature=temperature, top_p=top_p, key=key)
    prompts = jnp.asarray(prompt_tokens, jnp.int32), jnp.asarray(prompt_lengths, jnp.int32)
    stops = tuple(int(token) for token in stop_tokens)
    return _run(config, params, cache, *prompts, draw, gamma=gamma, max_new_tokens=max_new_tokens, stop_tokens=stops)


@partial(jax.jit, static_argnames=("config", "gamma", "max_new_tokens", "stop_tokens"))
def _run(
    config: DecoderConfig,
    params: PyTree,
    cache: KVCache,
    prompt_tokens: Array,
    prompt_lengths: Array,
    draw: Draw,
    *,
    gamma: int,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
) -> Reused:
    variables = {"params": params}
    recording, reusing = used_apply(config), chosen_apply(config)
    widths = jnp.array(config.widths)
    layers, neurons = len(widths), max(config.widths)

    def block(one_step: Any, state: State, more: Any) -> Any:
        """Up to `gamma` steps of `one_step(state, more)`."""
        end = state.step + gamma
        return jax.lax.while_loop(
            lambda carry: unfinished(carry[0]) & (carry[0].step < end), lambda carry: one_step(*carry), (state, more)
        )

    def load(state: State, used: Array) -> tuple[State, Array]:
        now = []

        def run(*args: Any, **kwargs: Any) -> Any:
            result, fired = recording(variables, *args, **kwargs)
            now.append(fired)
            return result

        state = advance(state, draw, stop_tokens, run)
        return state, used | now[0]

    def reuse(state: State, chosen: Any) -> tuple[State, Any]:
        return advance(state, draw, stop_tokens, partial(reusing, variables, chosen=chosen)), chosen

    def pair(carry: Any) -> Any:
        state, total, blocks = carry
        state, used = block(load, state, jnp.zeros((layers, neurons), bool))
        counts = used.sum(-1, dtype=jnp.int32)
        # Neurons that were used come first, in order.
        chosen = jnp.argsort(~used, axis=-1, stable=True).astype(jnp.int32)
        reuses = unfinished(state)
        state, _ = block(reuse, state, (chosen, counts))
        return state, total + reuses * counts / widths, blocks + reuses

    fixed = {"apply": neuron_apply(config), "max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens, "plan": None}
    state = prefill(params, cache, prompt_tokens, prompt_lengths, draw, **fixed)
    start = (state, jnp.zeros(layers), jnp.int32(0))
    state, total, blocks = jax.lax.while_loop(lambda carry: unfinished(carry[0]), pair, start)
    return Reused(state.written, state.counts, total / blocks)
