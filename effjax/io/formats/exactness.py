"""Whether a leaf can be stored in a format with the same values, why not, and the nearest leaf that can."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import CompressedArray, is_compressed
from effjax.arrays.codebook import Codebook
from effjax.arrays.permuted import Permuted
from effjax.arrays.quantized import Quantized
from effjax.errors import LeafError
from effjax.io.formats import awq, bitsandbytes, compressed_tensors, fp4, gptq
from effjax.io.formats.bitsandbytes import BNBScheme
from effjax.io.formats.compressed_tensors_config import CTScheme

Format = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "nvfp4", "mxfp4", "bnb-nf4", "gguf", "effjax"]
Scheme = gptq.GPTQScheme | awq.AWQScheme | CTScheme | BNBScheme
# Those that are Hugging Face directories of named tensors, with the module that writes their weights.
WRITERS: Mapping[str, ModuleType] = {
    "gptq": gptq,
    "gptq_v2": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "nvfp4": compressed_tensors,
    "mxfp4": compressed_tensors,
    "bnb-nf4": bitsandbytes,
}
FORMATS: tuple[Format, ...] = (*WRITERS, "gguf", "effjax")  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exactness:
    """A verdict: whether every value stays what it is, and why, in words that begin with the leaf ("its codes …")."""

    exact: bool
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A leaf as a format holds it: its scheme, and its tensors by their names behind the module's."""

    scheme: Scheme
    tensors: dict[str, np.ndarray]


def exactness(leaf: Any, target: Format, *, like: Scheme | None = None) -> Exactness:
    """Whether `leaf` can be stored in `target` with the same values, decided from the leaf itself.

    Args:
        leaf: a matrix `[in, out]`, compressed or dense, concrete.
        target: a format.
        like: how the leaf was stored where it came from, see `encode`.

    Raises:
        LeafError: an unknown format.

    Example:
        >>> import effjax as ej
        >>> leaf = ej.quantize.RTN(bits=3, group_size=32).quantize(jnp.ones((64, 32)))
        >>> exactness(leaf, "awq")
        Exactness(exact=False, reason='its codes have 3 bits; AWQ holds 4')
    """
    _check(target)
    if target == "effjax":
        return Exactness(exact=True, reason="its arrays are kept")
    if not is_compressed(leaf):
        return Exactness(exact=False, reason="it is dense, and would be rounded to a grid")
    if target == "gguf":
        from effjax.io.formats.gguf_blocks import why_not

        reasons = [why_not(leaf, kind) for kind in ("Q4_0", "Q8_0")]
        if None in reasons:
            return Exactness(exact=True, reason=f"as {'Q4_0' if reasons[0] is None else 'Q8_0'}")
        return Exactness(exact=False, reason=str(reasons[1]))
    try:
        encode(leaf, target, like=like)
    except LeafError as error:
        return Exactness(exact=False, reason=str(error))
    kept = "codes and scales" if isinstance(leaf, Codebook) else "codes, zero points and scales"
    return Exactness(exact=True, reason=f"its {kept} are kept")


def encode(leaf: Any, target: Format, *, like: Scheme | None = None) -> Encoded:
    """The tensors of a leaf in a format of `WRITERS`, with the same values.

    Args:
        leaf: a matrix `[in, out]`, compressed.
        target: a key of `WRITERS`.
        like: how the leaf was stored where it came from. The same format stores it so again, which gives the same
            bytes; another one takes over the group size, where the leaf's own groups are pieces of those.

    Raises:
        LeafError: saying what of the leaf the format cannot hold.
    """
    _check(target)
    if not is_compressed(leaf):
        raise LeafError("it is dense, and would be rounded to a grid")
    module, version = WRITERS[target], 2 if target == "gptq_v2" else 1
    for scheme in _like(target, like):
        try:
            return Encoded(scheme=scheme, tensors=module.write(leaf, scheme))
        except LeafError:
            continue  # the leaf was changed since, so it gets a scheme of its own
    if target in ("nvfp4", "mxfp4"):
        scheme = fp4.scheme(target)
    else:
        options: dict[str, Any] = {"version": version} if module is gptq else {}
        size = getattr(like, "group_size", None)
        try:
            scheme = module.scheme_for(leaf, group_size=size if size and size > 0 else None, **options)
        except LeafError:
            scheme = module.scheme_for(leaf, **options)
    return Encoded(scheme=scheme, tensors=module.write(leaf, scheme))


def _like(target: Format, like: Scheme | None) -> list[Scheme]:
    """The scheme of the source, where the target has such."""
    if isinstance(like, gptq.GPTQScheme) and target.startswith("gptq"):
        return [dataclasses.replace(like, version=2 if target == "gptq_v2" else 1)]
    if isinstance(like, awq.AWQScheme) and target == "awq":
        return [like]
    if isinstance(like, CTScheme) and target in ("compressed-tensors", like.format.partition("-")[0]):
        return [like]
    return []


def nearest(leaf: Any, target: Format, *, group_size: int | None = None, bits: int | None = None) -> CompressedArray:
    """A leaf that `target` can store, as near to `leaf` as plain rounding gets.

    Where only the scales are too wide, they alone are rounded, to float16; else the dense values are rounded to the
    nearest point of a new grid.

    Args:
        leaf: a matrix `[in, out]`, dense or compressed.
        target: a key of `WRITERS`.
        group_size: inputs that share a scale, where the format leaves a choice; None takes the leaf's own where they
            fit, else the largest of 128, 64, 32, 16 and 8 that divides, else all inputs.
        bits: of a code, where the format leaves a choice; None takes the leaf's own, or the next that the format has.

    Raises:
        LeafError: no weight of this shape can be stored in the format.
    """
    from effjax.quantize.fp4 import MXFP4, NVFP4
    from effjax.quantize.rtn import RTN

    _check(target)
    integer = target in ("gptq", "gptq_v2", "awq", "compressed-tensors")
    inner = leaf.array if isinstance(leaf, Permuted) else leaf
    if integer and isinstance(inner, Quantized) and group_size in (None, inner.group_size):
        scales = inner.scales.astype(jnp.float16)
        narrow = inner.replace(scales=scales)
        narrow = leaf.replace(array=narrow) if isinstance(leaf, Permuted) else narrow
        if bits in (None, inner.bits) and bool(jnp.isfinite(scales).all()) and exactness(narrow, target).exact:
            return narrow
    dense = leaf.materialize() if is_compressed(leaf) else jnp.asarray(leaf)
    dtype, w = dense.dtype, dense.astype(jnp.float32)
    if target == "bnb-nf4":
        found: CompressedArray = bitsandbytes.nearest(np.asarray(w), BNBScheme(dtype=dtype.name), dtype=dtype)
    elif target in ("nvfp4", "mxfp4"):
        found = _quantized(NVFP4() if target == "nvfp4" else MXFP4(), w)
    else:
        own = getattr(inner, "bits", 4) if bits is None else bits
        allowed = {"awq": (4,), "compressed-tensors": tuple(range(2, 9))}.get(target, gptq.BITS)
        width = min((b for b in allowed if b >= own), default=max(allowed))
        size = _group_size(w.shape[-2], inner if group_size is None else None, group_size)
        # Version 1 of GPTQ cannot tell a zero point of 0, which an asymmetric grid may need.
        method = RTN(bits=width, group_size=size, symmetric=target == "gptq", scale_dtype="float16")
        grid = _quantized(method, w)
        if not bool(jnp.isfinite(grid.scales).all()):
            raise LeafError("its values are too large for float16 scales")
        found = grid
    return found.astype(dtype)


@partial(jax.jit, static_argnums=0)
def _quantized(method: Any, w: jax.Array) -> Any:
    return method.quantize(w)


def _group_size(inputs: int, leaf: Any, wanted: int | None) -> int | None:
    own = leaf.group_size if isinstance(leaf, Quantized) else None
    if isinstance(leaf, Codebook) and leaf.scales is not None:
        own = inputs // leaf.scales.shape[-2]
    sizes = [size for size in (wanted, own, 128, 64, 32, 16, 8) if size and size >= 8 and inputs % size == 0]
    return sizes[0] if sizes and sizes[0] < inputs else None


def _check(target: str) -> None:
    if target not in FORMATS:
        raise LeafError(f"unknown format {target!r}; known are {', '.join(FORMATS)}")
