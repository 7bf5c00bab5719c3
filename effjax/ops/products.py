"""The products by the kind of their matrix, for callers who know what they hold; `matmul` takes any of them."""

from typing import Any

import jax
from jaxtyping import Array, Float

from effjax.arrays.base import CompressedArray
from effjax.arrays.codebook import Codebook
from effjax.arrays.hashed import Hashed
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.prepared import Prepared
from effjax.arrays.quantized import Quantized
from effjax.ops.matmul import Implementation, matmul

Rows = Float[Array, "*batch in"]
Products = Float[Array, "*batch out"]


def quant_matmul(
    x: Rows,
    w: Quantized,
    *,
    transpose: bool = False,
    implementation: Implementation | None = None,
    activation_bits: int | None = None,
) -> Products:
    """`y[o] = sum_i x[i] * scales[g(i), o] * (code[i, o] - zero[g(i), o])`, codes of 1 to 8 bits.

    Differentiable in `x`, in the scales and in real zero points; arguments, results and errors are those of `matmul`.
    `activation_bits=8` quantizes the activations to int8 on the way, with one scale for at most 256 inputs of a group:
    each is off by up to 1/254 of the largest of them, which for normal activations is 0.6 % of a product in the root
    mean square.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=4, group_size=None).quantize(jnp.eye(8))
        >>> ej.ops.quant_matmul(jnp.ones((1, 8)), w).shape
        (1, 8)
    """
    _expect("quant_matmul", w, Quantized)
    return matmul(x, w, transpose=transpose, implementation=implementation, activation_bits=activation_bits)


def codebook_matmul(
    x: Rows, w: Codebook, *, transpose: bool = False, implementation: Implementation | None = None
) -> Products:
    """`y[o] = sum_i x[i] * scales[g(i), o] * table[code[i, o]]`, with 2 to 256 values a matrix, column or group.

    Differentiable in `x`, in the tables and in the scales; see `matmul`.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.NF4(block_size=8).quantize(jnp.eye(8))
        >>> ej.ops.codebook_matmul(jnp.ones((1, 8)), w).shape
        (1, 8)
    """
    _expect("codebook_matmul", w, Codebook)
    return matmul(x, w, transpose=transpose, implementation=implementation)


def nm_matmul(
    x: Rows,
    w: NMSparse,
    *,
    transpose: bool = False,
    implementation: Implementation | None = None,
    activation_bits: int | None = None,
) -> Products:
    """A product with n of every m inputs of a column, their values floating or quantized (`quantize_kept`).

    Differentiable in `x`, and in the values or their scales; see `matmul`.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": jnp.eye(8)}
        >>> mask = ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.5, pattern="2:4"))
        >>> ej.ops.nm_matmul(jnp.ones((1, 8)), ej.pack_mask(params, mask)["kernel"]).tolist()
        [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    _expect("nm_matmul", w, NMSparse)
    return matmul(x, w, transpose=transpose, implementation=implementation, activation_bits=activation_bits)


def hashed_matmul(
    x: Rows, w: Hashed, *, transpose: bool = False, implementation: Implementation | None = None
) -> Products:
    """`y[o] = sum_i x[i] * sign(i, o) * table[h(i, o)]`: the matrix is never stored.

    Differentiable in `x` and in the table; see `matmul`.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.eye(16)}
        >>> w = ej.sketch_params(params, ej.sketch.Hashed(ratio=4), key=jax.random.key(0))["kernel"]
        >>> ej.ops.hashed_matmul(jnp.ones((1, 16)), w).shape
        (1, 16)
    """
    _expect("hashed_matmul", w, Hashed)
    return matmul(x, w, transpose=transpose, implementation=implementation)


def _expect(name: str, w: Any, kind: type[CompressedArray]) -> None:
    if isinstance(w, Prepared):
        return _expect(name, w.array, kind)
    if not isinstance(w, kind):
        what = f"an array {list(w.shape)}" if isinstance(w, jax.Array) else type(w).__name__
        raise TypeError(f"{name}: the matrix must be a {kind.__name__}, found {what}; ops.matmul takes any leaf")
