"""SqueezeLLM: a table of values for every output, by k-means of its weights under the Fisher diagonal."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.codebook import Codebook
from effjax.lift.calibrate import InputStats
from effjax.quantize.checks import check_bits, check_floating
from effjax.quantize.kmeans import nearest, weighted_kmeans
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.split import split_start
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqueezeLLM(Method):
    """Sensitivity-weighted non-uniform quantization (Kim et al. 2024, section 4.1), its dense form without outliers.

    The loss grows by `sum F (W - W')^2 / 2` to second order, `F` the diagonal of the Fisher information. For each
    output Lloyd's algorithm with weights `F` makes a table of `2**bits` values; codes are those of the nearest value,
    and no weight is changed to repair the error of another. Weights that are exactly zero do not count, as in the
    authors' code; where no weight counts all do alike.

    Attributes:
        bits: 1 to 8.
        iterations: of k-means at most. It starts from `split_start`, which draws nothing and ends nearer to the
            optimum than the k-means++ that the authors start from.
        table_dtype: dtype of the stored tables; codes are those of the nearest stored value.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (32, 8))}
        >>> x, method = jax.random.normal(jax.random.key(1), (16, 4, 32)), SqueezeLLM(bits=3)
        >>> fn = lambda p, x: x @ p["kernel"]
        >>> loss = lambda p, x: (fn(p, x) ** 2).sum()
        >>> stats = ej.calibrate(fn, params, [x], needs=method.needs, loss=loss)
        >>> q = ej.quantize_params(params, method, stats=stats)["kernel"]
        >>> q.tables.shape, q.bits
        ((1, 8, 8), 3)
    """

    bits: int = 4
    iterations: int = 50
    table_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations}: 0 (the start alone) or more")
        check_floating(table_dtype=self.table_dtype)

    needs = frozenset({"fisher"})
    sums = True

    def compress(self, w: jax.Array, *, stats: InputStats, key: Any = None) -> Codebook:
        return one_by_one(self._compress, w, stats.fisher)

    def _compress(self, w: Float[Array, "in out"], fisher: Float[Array, "in out"]) -> Codebook:
        values = w.astype(jnp.float32)
        counted = jnp.where(values == 0, 0.0, fisher)
        entries = 2**self.bits
        start = split_start(values, counted, entries)
        table = weighted_kmeans(values, counted, entries, start=start, iterations=self.iterations, tolerance=0.0)
        stored = table.astype(self.table_dtype)
        codes, _ = nearest(values, stored.astype(jnp.float32))
        return Codebook.from_codes(codes, stored.T[None], dtype=w.dtype)
