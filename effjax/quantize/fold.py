"""`fold_scales`: input factors of weights (AWQ's) moved into the layer that makes those inputs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax._compat import is_tracer
from effjax.arrays.base import PyTree, is_compressed
from effjax.arrays.codebook import Codebook
from effjax.arrays.permuted import Permuted
from effjax.arrays.quantized import Quantized
from effjax.arrays.row_scaled import RowScaled
from effjax.arrays.view import View
from effjax.errors import LeafError, RuleError
from effjax.paths import leaves_with_paths, map_with_paths

Fold = tuple[str, Sequence[str]]  # the producer, and all weights that take its outputs


def fold_scales(params: PyTree, folds: Sequence[Fold]) -> PyTree:
    """Moves the factors of `RowScaled` weights into what makes their inputs; the function of the model stays.

    A layer's outputs are multiplied by what its consumers would multiply their inputs with: a gain (of a norm)
    directly, a kernel `[in, out]` by columns (of a compressed kernel the scales or tables), and either's `bias`. The
    consumers lose their factors: `RowScaled(array)` becomes `array`, which file formats can hold. Stored dtypes stay:
    scales in float16 are rounded once more, by 2**-11 of their value at most.

    The caller says which outputs go nowhere else than into these consumers, with nothing but products between, as
    `effjax.models.folds.decoder_folds` does for the decoder.

    Args:
        params: parameter tree with compressed leaves.
        folds: pairs `(producer, consumers)` of paths. A producer may have one `*`, which stands for the same text in
            its consumers: `("*/mlp_norm/scale", ("*/mlp/gate_proj/kernel", "*/mlp/up_proj/kernel"))`. Where none of
            the consumers has factors nothing is done.

    Returns:
        The same tree with plain consumers.

    Raises:
        RuleError: a producer that matches nothing, a consumer that does not exist.
        LeafError: consumers of one producer with different factors or with none (seen on concrete arrays), or a
            producer whose outputs are not their inputs.

    Example:
        >>> import effjax as ej
        >>> array = ej.quantize.RTN(bits=8, group_size=None).quantize(jnp.eye(4))
        >>> scaled = RowScaled(array=array, row_scales=jnp.array([1.0, 2.0, 3.0, 4.0]))
        >>> params = {"norm": {"scale": jnp.ones(4)}, "up": {"kernel": scaled}}
        >>> folded = fold_scales(params, [("norm/scale", ["up/kernel"])])
        >>> folded["norm"]["scale"].tolist(), type(folded["up"]["kernel"]).__name__
        ([1.0, 2.0, 3.0, 4.0], 'Quantized')
    """
    leaves = dict(leaves_with_paths(params))
    changed: dict[str, Any] = {}
    for producer, consumers in folds:
        if not consumers:
            raise RuleError(f"{producer!r} is given no consumers: name the weights that take its outputs")
        places = [middle for path in leaves if (middle := _middle(producer, path)) is not None]
        if not places:
            raise RuleError(
                f"{producer!r} matches none of the {len(leaves)} leaves ({', '.join(list(leaves)[:4])}): write it as a "
                "path, or with one '*'"
            )
        for middle in places:
            here = {path: {**leaves, **changed}.get(path) for path in (c.replace("*", middle, 1) for c in consumers)}
            changed |= _fold(producer.replace("*", middle, 1), here, {**leaves, **changed})
    return map_with_paths(lambda path, leaf: changed.get(path, leaf), params)


def _middle(pattern: str, path: str) -> str | None:
    """What the `*` of `pattern` stands for in `path`: "" where it has none and is `path`, None where they differ."""
    if "*" not in pattern:
        return "" if pattern == path else None
    before, after = pattern.split("*", 1)
    fits = path.startswith(before) and path.endswith(after) and len(path) >= len(before) + len(after)
    return path[len(before) : len(path) - len(after)] if fits else None


def _fold(producer: str, consumers: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
    """The changed leaves of one producer and its consumers."""
    missing = [path for path, leaf in consumers.items() if leaf is None]
    if missing:
        raise RuleError(f"{producer!r} is said to feed {missing[0]!r}, which does not exist")
    factors = {path: _factors(leaf) for path, leaf in consumers.items()}
    plain = [path for path, found in factors.items() if found is None]
    if len(plain) == len(factors):
        return {}
    if plain:
        raise LeafError(
            f"{plain[0]} has no factors of its inputs, but others that {producer} feeds have: compress all of them "
            "with one AWQ method, so that they share factors"
        )
    (first, scale), *others = factors.items()
    for path, other in others:
        if not _same(scale, other):
            raise LeafError(
                f"{path} and {first} have different factors of the same inputs: compress them in one call, with one "
                "AWQ method and statistics that were gathered together"
            )
    changed = {path: _without(leaf) for path, leaf in consumers.items()}
    changed[producer] = _multiplied(producer, leaves[producer], scale, first)
    bias = producer.rsplit("/", 1)[0] + "/bias"
    if bias in leaves and bias != producer:
        changed[bias] = _multiplied(bias, leaves[bias], scale, first)
    return changed


def _factors(leaf: Any) -> jax.Array | None:
    if isinstance(leaf, View):
        return _factors(leaf.array)
    return leaf.row_scales if isinstance(leaf, RowScaled) else None


def _without(leaf: Any) -> Any:
    return leaf.replace(array=_without(leaf.array)) if isinstance(leaf, View) else leaf.array


def _same(a: Any, b: Any) -> bool:
    """Equal shapes, and equal values where they can be seen."""
    if a.shape != b.shape or any(is_tracer(x) or isinstance(x, jax.ShapeDtypeStruct) for x in (a, b)):
        return a.shape == b.shape
    return np.array_equal(np.asarray(a), np.asarray(b))


def _multiplied(path: str, leaf: Any, scale: Any, consumer: str) -> Any:
    """`leaf`, a gain, bias or kernel, with outputs `scale` times as large."""
    vector = leaf.ndim == scale.ndim
    if (
        leaf.shape[-1] != scale.shape[-1]
        or leaf.shape[: scale.ndim - 1] != scale.shape[:-1]
        or leaf.ndim > scale.ndim + 1
    ):
        raise LeafError(
            f"{path} {list(leaf.shape)} does not make the inputs of {consumer}, whose factors are {list(scale.shape)}: "
            "leave this pair out and compress the consumer with AWQ(scale=False)"
        )
    if not is_compressed(leaf):
        return _times(leaf, scale if vector else scale[..., None, :])
    if isinstance(leaf, Quantized | Codebook) and leaf.scales is not None and leaf.scales.dtype.itemsize > 1:
        return leaf.replace(scales=_times(leaf.scales, scale[..., None, :]))
    if isinstance(leaf, Codebook) and leaf.tables.shape[-2] == leaf.shape[-1]:
        return leaf.replace(tables=_times(leaf.tables, scale[..., None, :, None]))
    if isinstance(leaf, RowScaled | Permuted):
        return leaf.replace(array=_multiplied(path, leaf.array, scale, consumer))
    raise LeafError(f"{path} ({leaf}) has no scales of its outputs that the factors of {consumer} could go into")


def _times(x: jax.Array, factor: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * factor.astype(jnp.float32)).astype(x.dtype)
