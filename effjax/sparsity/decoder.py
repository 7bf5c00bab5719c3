"""Deja Vu on the decoder: what its predictors learn from, and the model under the neurons that they name."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.models.config import DecoderConfig
from effjax.models.intercept import intercepted, layer_of
from effjax.sparsity.dejavu import Scores, Tap, neuron_masks

PyTree = Any


def decoder_taps(config: DecoderConfig) -> Callable[[PyTree, Int[Array, "batch length"]], list[Tap]]:
    """The `apply_with_taps` of `collect_sparsity` for a decoder.

    Args:
        config: of the decoder, with ReLUs or with SiLU.

    Returns:
        `(params, tokens)` -> a tap for every layer: what enters the block, and what enters its down projection.

    Example:
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> tokens = jnp.zeros((1, 5), jnp.int32)
        >>> taps = decoder_taps(config)(Decoder(config).init(jax.random.key(0), tokens)["params"], tokens)
        >>> len(taps), taps[0].query.shape, taps[1].activation.shape
        (2, (1, 5, 32), (1, 5, 64))
    """

    def apply_with_taps(params: PyTree, tokens: Int[Array, "batch length"]) -> list[Tap]:
        inputs, activations = [], []

        def see(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if layer_of(context) is not None:
                inputs.append(args[0][0])  # of the carry: the residual stream
            elif layer_of(context, "mlp", "down_proj") is not None:
                activations.append(args[0])
            return call(*args, **kwargs)

        intercepted(config, see)({"params": params}, tokens)
        return [Tap(query=x, activation=h) for x, h in zip(inputs, activations, strict=True)]

    return apply_with_taps


def down_norms(config: DecoderConfig, params: PyTree) -> list[Float[Array, " neurons"]]:
    """The length of each neuron's row of the down projection, for the labels of models with SiLU.

    Args:
        params: dense, with layers written out (`effjax.models.decoder.unstack_layers`).
    """
    kernels = [params[f"layers_{i}"]["mlp"]["down_proj"]["kernel"] for i in range(config.num_hidden_layers)]
    return [jnp.linalg.norm(kernel.astype(jnp.float32), axis=1) for kernel in kernels]


def apply_contextual(
    config: DecoderConfig, scores: Sequence[Scores], k: int | Sequence[int | None], *, lookahead: bool = False
) -> Callable[..., Any]:
    """A decoder's `apply` in which every token has the `k` neurons of best score alone.

    Neurons are masked, so that this tells what a choice costs in quality; `effjax.sparsity.contextual_mlp` is what
    makes it fast.

    Args:
        config: of the decoder.
        scores: a predictor for every layer (`train_predictors`), or a control.
        k: neurons a token; for every layer its own, or one for all. None leaves a layer dense.
        lookahead: the neurons of a layer are chosen by what enters the one before, as in `collect_sparsity`.

    Returns:
        `apply({"params": params}, tokens, **kwargs)`, as `effjax.models.decoder.DecoderApply`.

    Example:
        >>> from effjax.models.decoder import Decoder
        >>> from effjax.sparsity.dejavu import random_scores
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> tokens = jnp.zeros((1, 5), jnp.int32)
        >>> variables = Decoder(config).init(jax.random.key(0), tokens)
        >>> apply_contextual(config, [random_scores(jax.random.key(1), 64)] * 2, 16)(variables, tokens).shape
        (1, 5, 256)
    """
    hook = neuron_masks(scores, k, lookahead=lookahead)

    def apply(variables: PyTree, tokens: Int[Array, "batch length"], **kwargs: Any) -> Any:
        inputs: list[jax.Array] = []

        def choose(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if layer_of(context) is not None:
                inputs.append(args[0][0])
            elif (layer := layer_of(context, "mlp", "down_proj")) is not None:
                args = (hook(layer, inputs, args[0]), *args[1:])
            return call(*args, **kwargs)

        return intercepted(config, choose)(variables, tokens, **kwargs)

    return apply
