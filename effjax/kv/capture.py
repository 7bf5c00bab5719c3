"""Keys before rotation and values of a text, with the gradients of the loss with respect to them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.errors import CalibrationError, ConfigError
from effjax.evaluate.loss import next_token_nll
from effjax.models.config import DecoderConfig
from effjax.models.intercept import intercepted, layer_of

PyTree = Any
Part = Literal["keys", "values"]
Change = Callable[[int, Part, Float[Array, "batch kv_heads length head_dim"]], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CapturedKV:
    """What a calibration text shows of a cache, float32 `[layers, kv_heads, tokens, head_dim]` each.

    Attributes:
        keys: before rotation, after the norm of heads where a model has one.
        values: as the cache holds them.
        key_grads, value_grads: gradients of the summed next-token loss of each window; those of a key head gather what
            all its query heads give.
    """

    keys: Any
    values: Any
    key_grads: Any
    value_grads: Any


def changed_kv(config: DecoderConfig, change: Change) -> Callable[..., Any]:
    """A decoder's `apply` in which all keys, before rotation, and values pass a function.

    The model is not touched: the outputs of its projections are intercepted (`flax.linen.intercept_methods`), of the
    norm of key heads where there is one.

    Args:
        config: of the decoder. The layers of `params` may be stacked for a scan or not; they run one by one.
        change: `change(layer, "keys" or "values", x)` gives what stands in place of `x [batch, kv_heads, length,
            head_dim]`, of its shape.

    Returns:
        `apply({"params": params}, tokens, **kwargs)`, as `effjax.models.decoder.DecoderApply`.

    Example:
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> tokens = jnp.zeros((1, 5), jnp.int32)
        >>> variables = Decoder(config).init(jax.random.key(0), tokens)
        >>> apply = changed_kv(config, lambda layer, part, x: jnp.zeros_like(x) if part == "values" else x)
        >>> apply(variables, tokens).shape
        (1, 5, 256)
    """
    places: dict[str, Part] = {"k_norm" if config.qk_norm else "k_proj": "keys", "v_proj": "values"}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        name = context.module.name
        layer = layer_of(context, "attention", name)
        if layer is None or name not in places:
            return y
        batch, length = y.shape[:2]
        heads = y.reshape(batch, length, config.num_key_value_heads, config.head_dim).swapaxes(1, 2)
        new = change(layer, places[name], heads)
        return new.astype(y.dtype).swapaxes(1, 2).reshape(y.shape)

    return intercepted(config, intercept)


def capture_kv(
    config: DecoderConfig,
    params: PyTree,
    windows: Int[np.ndarray, "windows length"],
    *,
    batch_size: int = 8,
    skip: int = 0,
) -> CapturedKV:
    """Runs a text and keeps its keys and values with their gradients.

    Zeros are added to keys and values, and the loss is differentiated with respect to the zeros. The loss of a window
    is the sum of the negative log-likelihoods of all its tokens but the first.

    Args:
        config: of the decoder.
        params: its parameters, dense.
        windows: token ids; all windows are of one length, without padding.
        batch_size: windows that run at once.
        skip: the first tokens of each window to leave out, such as the one that every text begins with.

    Raises:
        CalibrationError: there are no windows of two tokens or more, or a gradient is not finite.
        ConfigError: `skip` leaves no token, or `batch_size` is below 1.

    Example:
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> windows = np.arange(24).reshape(3, 8)
        >>> params = Decoder(config).init(jax.random.key(0), windows)["params"]
        >>> capture_kv(config, params, windows).key_grads.shape
        (2, 4, 24, 8)
    """
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise CalibrationError(
            f"windows have shape {windows.shape}; give at least one window of at least 2 tokens "
            "(effjax.evaluate.windows_from_text cuts them from a text)"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: use at least 1")
    if not 0 <= skip < windows.shape[1]:
        raise ConfigError(f"skip={skip} leaves no token of windows of {windows.shape[1]}")
    step = jax.jit(lambda p, tokens: kv_and_gradients(config, p, tokens))
    parts = []
    for start in range(0, len(windows), batch_size):
        found = step(params, windows[start : start + batch_size])
        parts.append([np.asarray(x)[:, :, :, skip:] for x in found])
    arrays = []
    for pieces in zip(*parts, strict=True):
        whole = np.concatenate(pieces, axis=1).swapaxes(1, 2)  # [layers, kv_heads, windows, length, head_dim]
        arrays.append(whole.reshape(*whole.shape[:2], -1, whole.shape[-1]))
    for name, x in zip(("keys", "values", "key gradients", "value gradients"), arrays, strict=True):
        if not np.isfinite(x).all():
            layer = int(np.argmax(~np.isfinite(x).all(axis=(1, 2, 3))))
            raise CalibrationError(f"{name} of layer {layer} are not finite; run `effjax verify` on the model")
    keys, values, key_grads, value_grads = (jnp.asarray(x) for x in arrays)
    return CapturedKV(keys=keys, values=values, key_grads=key_grads, value_grads=value_grads)


def kv_and_gradients(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "batch length"]
) -> tuple[Array, Array, Array, Array]:
    """Keys, values and the gradients of both, float32 `[layers, batch, kv_heads, length, head_dim]` each."""
    shape = (config.num_key_value_heads, tokens.shape[1], config.head_dim)
    zeros = jnp.zeros((config.num_hidden_layers, tokens.shape[0], *shape), jnp.float32)
    wide = dataclasses.replace(config, dtype="float32")

    def loss(added: dict[Part, Array]) -> tuple[Array, dict[tuple[int, Part], Array]]:
        seen: dict[tuple[int, Part], Array] = {}

        def add(layer: int, part: Part, x: Array) -> Array:
            seen[layer, part] = x
            return x + added[part][layer]

        logits = changed_kv(wide, add)({"params": params}, tokens)
        return jnp.sum(next_token_nll(logits[:, :-1], tokens[:, 1:])), seen

    slopes, seen = jax.grad(loss, has_aux=True)({"keys": zeros, "values": zeros})
    parts: tuple[Part, Part] = ("keys", "values")
    keys, values = (jnp.stack([seen[i, part] for i in range(config.num_hidden_layers)]) for part in parts)
    return keys, values, slopes["keys"], slopes["values"]
