"""A decoder's `apply` with a look at, or a hand on, the calls of its modules."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Int

from effjax.models.config import DecoderConfig
from effjax.models.decoder import DecoderApply, unstack_layers

PyTree = Any
# intercept(call, args, kwargs, context) gives the result of a module's method, as in `flax.linen.intercept_methods`.
Intercept = Callable[[Callable[..., Any], Any, Any, nn.module.InterceptorContext], Any]


def intercepted(config: DecoderConfig, intercept: Intercept) -> Callable[..., Any]:
    """The decoder with every call of a module passed through a function; the model is not touched.

    Layers run one by one, so that paths of modules begin with `layers_0`, `layers_1`, …

    Args:
        config: of the decoder. The layers of `params` may be stacked for a scan or not.
        intercept: see `flax.linen.intercept_methods`.

    Returns:
        `apply({"params": params}, tokens, **kwargs)`, as `effjax.models.decoder.DecoderApply`.
    """
    run = DecoderApply(dataclasses.replace(config, scan_layers=False, remat=False))

    def apply(variables: PyTree, tokens: Int[Array, "batch length"], **kwargs: Any) -> Any:
        params = variables["params"]
        flat = {"params": unstack_layers(params) if "layers" in params else params}
        with nn.intercept_methods(intercept):
            return run(flat, tokens, **kwargs)

    return apply


def layer_of(context: nn.module.InterceptorContext, *place: str) -> int | None:
    """The number of the layer when it, or the module at `place` in it such as `"mlp", "down_proj"`, is called."""
    path = context.module.path
    if context.method_name != "__call__" or path[1:] != place or not path or not path[0].startswith("layers_"):
        return None
    return int(path[0].removeprefix("layers_"))
