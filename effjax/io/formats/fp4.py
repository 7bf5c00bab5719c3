"""Four-bit floats of compressed-tensors: `nvfp4-pack` (groups of 16, two levels of scales), `mxfp4-pack` (32).

A weight is `weight_packed` uint8 `[out, in / 2]`, low nibble first, a nibble being sign and index into 0, ½, 1, 1½, 2,
3, 4, 6: transposed, the packing of `effjax.arrays.Codebook`. NVFP4 scales are float8 (e4m3) divided by one float32 a
tensor; MXFP4 scales are powers of two (e8m0, stored as uint8).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from effjax.arrays.codebook import Codebook
from effjax.arrays.float_values import E2M1
from effjax.errors import CheckpointError, LeafError
from effjax.io.formats.checks import AGAIN, Tensors, take
from effjax.io.formats.compressed_tensors_config import CTScheme

Kind = Literal["nvfp4", "mxfp4"]
GROUP = {"nvfp4": 16, "mxfp4": 32}
SCALE = {"nvfp4": np.dtype(ml_dtypes.float8_e4m3fn), "mxfp4": np.dtype(ml_dtypes.float8_e8m0fnu)}


def read(name: str, tensors: Tensors, *, shape: tuple[int, int], dtype: Any, kind: str) -> Codebook:
    """One weight.

    Args:
        name: the module, for messages.
        tensors: weight_packed, weight_scale, and with NVFP4 weight_global_scale.
        shape: `(in, out)` of the weight.
        dtype: of the leaf's dense array.
        kind: "nvfp4" or "mxfp4".

    Raises:
        CheckpointError: a tensor that is missing, of a wrong dtype or shape, or not finite.
    """
    (inputs, outputs), size = shape, GROUP[kind]
    if inputs % size:
        raise CheckpointError(f"{name}: groups of {size} do not divide its {inputs} inputs; {AGAIN}")
    why = f"{inputs} inputs in groups of {size}"
    packed = take(tensors, name, "weight_packed", dtypes=["uint8"], shape=(outputs, inputs // 2), why=why)
    grid, stored = (outputs, inputs // size), SCALE[kind]
    dtypes = [stored.name] if kind == "nvfp4" else ["uint8", stored.name]
    scale = take(tensors, name, "weight_scale", dtypes=dtypes, shape=grid, why=why)
    if kind == "mxfp4" and (scale.view(np.uint8) == 255).any():
        raise CheckpointError(f"{name}.weight_scale holds 255, which is NaN as a power of two; {AGAIN}")
    top = None
    if kind == "nvfp4":
        given = tensors.get("weight_global_scale", np.zeros(1))
        top = take(tensors, name, "weight_global_scale", dtypes=["float32"], shape=(1,) if np.ndim(given) else ())
        if not top.reshape(()) > 0:
            raise CheckpointError(
                f"{name}.weight_global_scale is {top.reshape(())}, by which scales are divided; {AGAIN}"
            )
    leaf = Codebook(
        codes=jnp.asarray(np.ascontiguousarray(packed.T)),
        tables=jnp.asarray(E2M1, jnp.float32).reshape(1, 1, 16),
        scales=jnp.asarray(np.ascontiguousarray(scale.T).view(stored)),
        bits=4,
        dtype=jnp.dtype(dtype),
        global_scale=None if top is None else jnp.asarray(top.reshape(1, 1)),
    )
    if top is not None and not np.isfinite(np.asarray(leaf.float_scales())).all():
        raise CheckpointError(
            f"{name}.weight_global_scale is {top.reshape(())}: scales overflow when divided by it; {AGAIN}"
        )
    return leaf


def kind_of(leaf: Any) -> Kind | None:
    """Which of the two formats a leaf of e2m1 values is, by its groups and scales; None for another leaf."""
    if not has_e2m1_values(leaf) or leaf.scales is None or leaf.codes.ndim != 2:
        return None
    size = leaf.shape[-2] // leaf.scales.shape[-2]
    for kind in ("nvfp4", "mxfp4"):
        if size == GROUP[kind] and leaf.scales.dtype == SCALE[kind]:
            return kind if kind == "nvfp4" or leaf.global_scale is None else None
    return None


def has_e2m1_values(leaf: Any) -> bool:
    """Whether a leaf is a `Codebook` whose one table is that of e2m1."""
    return (
        isinstance(leaf, Codebook)
        and leaf.bits == 4
        and leaf.tables.shape[-3:] == (1, 1, 16)
        and np.array_equal(np.asarray(leaf.tables, np.float32).ravel()[:16], np.asarray(E2M1, np.float32))
    )


def scheme(kind: Kind) -> CTScheme:
    """The scheme of one of the two formats."""
    strategy = "tensor_group" if kind == "nvfp4" else "group"
    return CTScheme(format=f"{kind}-pack-quantized", num_bits=4, strategy=strategy, group_size=GROUP[kind])


def write(leaf: Any, kind: str) -> dict[str, np.ndarray]:
    """The tensors of one leaf: the inverse of `read`.

    Raises:
        LeafError: saying what of the leaf the format cannot hold.

    Example:
        >>> import effjax as ej
        >>> tensors = write(ej.quantize.NVFP4().quantize(jnp.ones((64, 8))), "nvfp4")
        >>> {name: (x.dtype.name, x.shape) for name, x in tensors.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'weight_packed': ('uint8', (8, 32)), 'weight_scale': ('float8_e4m3fn', (8, 4)),
         'weight_global_scale': ('float32', (1,))}
    """
    if kind_of(leaf) != kind:
        if not has_e2m1_values(leaf):
            raise LeafError(f"its values ({type(leaf).__name__}) are no e2m1 numbers")
        raise LeafError(f"its scales are not those of {kind}: {SCALE[kind].name}, one for {GROUP[kind]} inputs")
    codes, scales = (np.asarray(jax.device_get(x)) for x in (leaf.codes, leaf.scales))
    if leaf.pad:
        raise LeafError(f"its {leaf.shape[-2]} inputs fill no whole bytes")
    tensors = {"weight_packed": np.ascontiguousarray(codes.T), "weight_scale": np.ascontiguousarray(scales.T)}
    if kind == "mxfp4":
        return {**tensors, "weight_scale": tensors["weight_scale"].view(np.uint8)}
    top = np.ones(1, np.float32) if leaf.global_scale is None else np.asarray(jax.device_get(leaf.global_scale))
    return {**tensors, "weight_global_scale": top.reshape(1).astype(np.float32)}
