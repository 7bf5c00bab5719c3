"""The feed-forward neurons of a decoder, token by token: seen, or changed on the way."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.models.config import DecoderConfig
from effjax.models.intercept import intercepted, layer_of

PyTree = Any
Change = Callable[[int, Float[Array, "batch length neurons"]], Array]


def changed_neurons(config: DecoderConfig, change: Change) -> Callable[..., Any]:
    """A decoder's `apply` in which what enters every down projection passes a function.

    Args:
        config: of the decoder.
        change: `change(layer, h)` gives what stands in place of `h [batch, length, neurons]`, of its shape.

    Returns:
        `apply({"params": params}, tokens, **kwargs)`, as `effjax.models.decoder.DecoderApply`.

    Example:
        >>> import jax
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> tokens = jnp.zeros((1, 5), jnp.int32)
        >>> variables = Decoder(config).init(jax.random.key(0), tokens)
        >>> half = changed_neurons(config, lambda layer, h: h.at[..., ::2].set(0))
        >>> half(variables, tokens).shape
        (1, 5, 256)
    """

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = layer_of(context, "mlp", "down_proj")
        if layer is None:
            return call(*args, **kwargs)
        (h,) = args
        return call(change(layer, h).astype(h.dtype), **kwargs)

    return intercepted(config, intercept)


def active_neurons(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "batch length"]
) -> Bool[Array, "layers batch length neurons"]:
    """Which neurons are not exactly 0, for every token of one batch.

    Example:
        >>> import dataclasses
        >>> from effjax.models.embedded import load_default
        >>> model = load_default()
        >>> relu = dataclasses.replace(model.config, hidden_act="relu")
        >>> active = active_neurons(relu, model.params, jnp.arange(8)[None])
        >>> active.shape, 0.3 < active.mean() < 0.7
        ((4, 1, 8, 640), Array(True, dtype=bool))
    """
    config.one_width("active_neurons")
    seen: dict[int, Array] = {}

    def see(layer: int, h: Array) -> Array:
        seen[layer] = h != 0
        return h

    changed_neurons(config, see)({"params": params}, tokens)
    return jnp.stack([seen[layer] for layer in range(config.num_hidden_layers)])


def gate_inputs(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "batch length"]
) -> Float[Array, "layers batch length neurons"]:
    """What the activation of every neuron is applied to, before any shift: the gate, or `up` where there is none.

    For `effjax.sparsity.shift_for`.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> model = load_default()
        >>> gate_inputs(model.config, model.params, jnp.arange(8)[None]).shape
        (4, 1, 8, 640)
    """
    config.one_width("gate_inputs")
    seen: list[Array] = []
    name = "up_proj" if config.is_opt else "gate_proj"

    def see(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if layer_of(context, "mlp", name) is not None:
            seen.append(y)
        return y

    intercepted(config, see)({"params": params}, tokens)
    return jnp.stack(seen)
