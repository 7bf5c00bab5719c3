"""A decoder whose feed-forward layers lie neuron by neuron, so that rows of neurons at rest are not read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from effjax.models.config import DecoderConfig
from effjax.models.decoder import unstack_layers
from effjax.models.intercept import intercepted, layer_of
from effjax.ops.neurons import Neurons, make_neurons
from effjax.ops.sparse_mlp import sparse_mlp, sparse_mlp_used

PyTree = Any
MLP = Callable[[int, Float[Array, "batch length hidden"], Neurons], Array]
Chosen = tuple[Int32[Array, "layers neurons"], Int32[Array, " layers"]]


def by_neuron(config: DecoderConfig, params: PyTree) -> PyTree:
    """The parameters of a decoder with `layers_{i}/mlp` laid out by neuron, for `neuron_apply`.

    Args:
        config: of the decoder.
        params: dense, or with feed-forward kernels quantized to 4 or 8 bits, which keep their codes. Layers may be
            stacked for a scan or not.

    Returns:
        The same tree with `effjax.ops.neurons.Neurons` in place of the kernels of every feed-forward layer.

    Raises:
        LeafError: kernels that have no rows, see `make_neurons`.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> model = load_default(dtype="float32")
        >>> by_neuron(model.config, model.params)["layers_0"]["mlp"].count
        640
    """
    flat = dict(unstack_layers(params) if "layers" in params else params)
    for i in range(config.num_hidden_layers):
        layer = flat[f"layers_{i}"]
        kernels = {name: entry["kernel"] for name, entry in layer["mlp"].items()}
        biases = {f"{name.removesuffix('_proj')}_bias": entry.get("bias") for name, entry in layer["mlp"].items()}
        neurons = make_neurons(
            kernels["up_proj"],
            kernels["down_proj"],
            gate=kernels.get("gate_proj"),
            activation="silu" if config.hidden_act == "silu" else "relu",
            shift=config.relu_shift,
            **biases,
        )
        flat[f"layers_{i}"] = layer | {"mlp": neurons}
    return flat


def with_mlp(config: DecoderConfig, mlp: MLP) -> Callable[..., Any]:
    """The decoder's `apply` for parameters of `by_neuron`, with `mlp(layer, x, neurons)` in the feed-forward layers."""

    def apply(variables: PyTree, tokens: Int[Array, "batch length"], **kwargs: Any) -> Any:
        params = variables["params"]

        def run(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            layer = layer_of(context, "mlp")
            if layer is None:
                return call(*args, **kwargs)
            (x,) = args
            return mlp(layer, x, params[f"layers_{layer}"]["mlp"]).astype(x.dtype)

        return intercepted(config, run)(variables, tokens, **kwargs)

    return apply


def neuron_apply(config: DecoderConfig) -> Callable[..., Any]:
    """The decoder's `apply` for parameters of `by_neuron`: the same logits, without rows that meet only zeros.

    On a CPU a ReLU's zeros are found as they come: an `up` row is not read where all tokens of the step have a closed
    gate, nor a `down` row where the neuron rests for all of them. So tokens that are verified together, as in
    speculative decoding, read the union of their neurons (Mirzadeh et al., ReLU Strikes Back, section 5.2). Many tokens
    at once, as of a prompt, are multiplied densely.

    Args:
        config: of the decoder.

    Returns:
        `apply({"params": params}, tokens, **kwargs)`, as `effjax.models.decoder.DecoderApply`; give the same object to
        `generate` again to reuse the compiled programs.

    Example:
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                        num_attention_heads=4, hidden_act="relu")
        >>> tokens = jnp.zeros((1, 5), jnp.int32)
        >>> params = Decoder(config).init(jax.random.key(0), tokens)["params"]
        >>> neuron_apply(config)({"params": by_neuron(config, params)}, tokens).shape
        (1, 5, 256)
    """

    def every(layer: int, x: jax.Array, neurons: Neurons) -> jax.Array:
        return sparse_mlp(x, neurons, jnp.arange(neurons.count, dtype=jnp.int32))

    return with_mlp(config, every)


def used_apply(config: DecoderConfig) -> Callable[..., tuple[Any, Bool[Array, "layers neurons"]]]:
    """As `neuron_apply`, and also which neurons were not zero for some token of the call.

    Layers with fewer neurons than others end in neurons that never are used.
    """
    widest = max(config.widths)

    def apply(variables: PyTree, tokens: Int[Array, "batch length"], **kwargs: Any) -> Any:
        seen = []

        def record(layer: int, x: jax.Array, neurons: Neurons) -> jax.Array:
            y, used = sparse_mlp_used(x, neurons, jnp.arange(neurons.count, dtype=jnp.int32))
            seen.append(jnp.pad(used, (0, widest - neurons.count)))
            return y

        result = with_mlp(config, record)(variables, tokens, **kwargs)
        return result, jnp.stack(seen)

    return apply


def chosen_apply(config: DecoderConfig) -> Callable[..., Any]:
    """As `neuron_apply`, with some neurons alone: `apply(variables, tokens, chosen=(neurons, counts), **kwargs)`."""

    def apply(variables: PyTree, tokens: Int[Array, "batch length"], *, chosen: Chosen, **kwargs: Any) -> Any:
        neurons, counts = chosen
        some = with_mlp(config, lambda layer, x, all: sparse_mlp(x, all, neurons[layer], counts[layer]))
        return some(variables, tokens, **kwargs)

    return apply
