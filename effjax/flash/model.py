"""A decoder taken apart for flash: what stays in memory, what goes to the file, and the same masks in memory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.flash.bundles import FeedForward
from effjax.models.config import DecoderConfig
from effjax.models.decoder import unstack_layers
from effjax.models.intercept import intercepted, layer_of
from effjax.sparsity.dejavu import Scores

PyTree = Any


def feed_forwards(config: DecoderConfig, params: PyTree) -> list[FeedForward]:
    """The feed-forward layers of a decoder, to be written by `write_bundles`; the shift of its ReLU is in the bias.

    Args:
        config: of a decoder with ReLUs.
        params: dense.

    Raises:
        ConfigError: a decoder without ReLUs, every neuron of which every token needs.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> from effjax.sparsity.relu import relufy
        >>> model = load_default()
        >>> len(feed_forwards(relufy(model.config, shift=0.5), model.params))
        4
    """
    if config.hidden_act != "relu":
        raise ConfigError(
            f"feed_forwards: hidden_act={config.hidden_act!r} leaves no neuron at rest; exchange it by "
            "effjax.sparsity.relufy and train a little further"
        )
    params = unstack_layers(params) if "layers" in params else params
    found = []
    for i in range(config.num_hidden_layers):
        mlp = params[f"layers_{i}"]["mlp"]
        kernels = {name: mlp[f"{name}_proj"]["kernel"] for name in ("gate", "up", "down") if f"{name}_proj" in mlp}
        biases = {f"{name}_bias": mlp[f"{name}_proj"].get("bias") for name in kernels}
        switch = "gate" if "gate" in kernels else "up"
        if config.relu_shift:
            old = biases[f"{switch}_bias"]
            zeros = jnp.zeros(kernels[switch].shape[1]) if old is None else old
            biases[f"{switch}_bias"] = zeros - config.relu_shift
        found.append(FeedForward(**kernels, **biases))
    return found


def resident_params(params: PyTree) -> PyTree:
    """All that stays in memory: the decoder's parameters, layers written out, without their feed-forward kernels.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> sorted(resident_params(load_default().params)["layers_0"])
        ['attention', 'attention_norm', 'mlp_norm']
    """
    params = unstack_layers(params) if "layers" in params else params
    return {
        name: {part: tree for part, tree in value.items() if part != "mlp"} if name.startswith("layers_") else value
        for name, value in params.items()
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Oracle:
    """The scores of a predictor that is never wrong: what a layer's ReLU is applied to. It needs the weights in memory.

    Attributes:
        kernel: `[d, neurons]` of the gate, or of the up projection where there is none.
        bias: `[neurons]`.
    """

    kernel: Float[Array, "d neurons"]
    bias: Float[Array, " neurons"]

    def __call__(self, query: Float[Array, "*batch d"]) -> Float[Array, "*batch neurons"]:
        return query @ self.kernel.astype(query.dtype) + self.bias


def oracles(layers: Sequence[FeedForward]) -> list[Oracle]:
    """One for each layer."""
    found = []
    for ffn in layers:
        kernel, bias = (ffn.up, ffn.up_bias) if ffn.gate is None else (ffn.gate, ffn.gate_bias)
        found.append(Oracle(kernel=kernel, bias=jnp.zeros(ffn.neurons) if bias is None else bias))
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Every:
    """Scores under which every token needs every neuron: reading densely."""

    neurons: int = dataclasses.field(metadata={"static": True})

    def __call__(self, query: Float[Array, "*batch d"]) -> Float[Array, "*batch neurons"]:
        return jnp.ones((*query.shape[:-1], self.neurons))


def windowed(active: Bool[Array, "*batch time neurons"], window: int) -> Bool[Array, "*batch time neurons"]:
    """Neurons that one of the last `window` tokens used: what a cache holds.

    Example:
        >>> windowed(jnp.array([[True], [False], [False]]), 2)[:, 0].tolist()
        [True, True, False]
    """
    time = jnp.arange(active.shape[-2])[:, None]
    last = jax.lax.cummax(jnp.where(active, time, -window), axis=active.ndim - 2)
    return time - last < window


def apply_windowed(
    config: DecoderConfig,
    predictors: Sequence[Scores],
    window: int,
    *,
    threshold: float = 0.0,
    see: Callable[[int, jax.Array, jax.Array, jax.Array], None] | None = None,
) -> Callable[..., Any]:
    """A decoder's `apply` in which each token has the neurons that a cache would hold for it; all weights in memory.

    What `FlashDecoder` computes as long as its caches do not overflow, for whole texts at once and without a
    key-value cache.

    Args:
        predictors: scores of each layer, from what enters its up projection.
        window: tokens that a neuron stays.
        threshold: of scores, above which a neuron is used; scores are logits, so that 0 is a probability of one half.
        see: is shown layer, what enters the layer, the predicted neurons, and the activations before they are masked.

    Returns:
        `apply({"params": params}, tokens)`, as `effjax.models.decoder.DecoderApply`.
    """

    def apply(variables: PyTree, tokens: Int[Array, "batch length"], **kwargs: Any) -> Any:
        queries: list[jax.Array] = []

        def mask(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if layer_of(context, "mlp") is not None:
                queries.append(args[0])
            elif (layer := layer_of(context, "mlp", "down_proj")) is not None:
                predicted = predictors[layer](queries[-1]) > threshold
                if see is not None:
                    see(layer, queries[-1], predicted, args[0])
                args = (jnp.where(windowed(predicted, window), args[0], 0), *args[1:])
            return call(*args, **kwargs)

        return intercepted(config, mask)(variables, tokens, **kwargs)

    return apply
