"""Round to nearest: the data-free baseline, with the full range or the clipping that minimises the squared error."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.quantized import Quantized, centre
from effjax.errors import LeafError
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """Rounds every weight to the nearest point of its group's uniform grid.

    Symmetric: codes around `2**(bits-1)`, `scale = max|w| / (2**(bits-1) - 1)`. Asymmetric: the grid spans
    `[min(0, min w), max(0, max w)]` with an integer zero point (specs of the usual round-to-nearest baseline).

    Attributes:
        bits: 1 to 8.
        group_size: consecutive inputs that share a scale; None is one group a column (per channel).
        symmetric: whether the grid is centred at zero.
        clip: "absmax" spans the whole range; "mse" tries `steps` smaller ranges down to `smallest` of it and keeps, for
            every group, the one of least squared error.
        steps: ranges that "mse" tries.
        smallest: the smallest fraction of the range that "mse" tries.
        scale_dtype: dtype the scales are stored in; codes are rounded with the stored scale.

    Example:
        >>> import jax
        >>> w = jax.random.normal(jax.random.key(0), (64, 8))
        >>> q = RTN(bits=4, group_size=32).quantize(w)
        >>> q.bits, q.group_size, q.shape
        (4, 32, (64, 8))
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    clip: Literal["absmax", "mse"] = "absmax"
    steps: int = 40
    smallest: float = 0.4
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: choose 1 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: a positive number, or None for one group a column")
        if self.clip not in ("absmax", "mse"):
            raise ValueError(f"clip={self.clip!r}: choose 'absmax' or 'mse'")
        if self.steps < 1 or not 0 < self.smallest <= 1:
            raise ValueError(f"steps={self.steps}, smallest={self.smallest}: at least one step, a fraction in (0, 1]")
        if not jnp.issubdtype(jnp.dtype(self.scale_dtype), jnp.floating):
            raise ValueError(f"scale_dtype={self.scale_dtype!r} is no floating dtype")

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return self.clip == "mse" or (self.bits == 1 and self.symmetric)

    def check(self, shape: tuple[int, ...]) -> None:
        check_groups(shape, self.group_size)

    def compress(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> Quantized:
        return self.quantize(w)

    def quantize(self, w: Float[Array, "*L in out"]) -> Quantized:
        """Quantizes one weight.

        Raises:
            LeafError: the group size does not divide the inputs.
        """
        self.check(w.shape)
        groups = grouped(w.astype(jnp.float32), self.group_size)
        low, high = self._range(groups)
        if self.clip == "mse":
            shrink = self._best_shrink(groups, low, high)
            low, high = low * shrink, high * shrink
        codes, scales, zeros = self._round(groups, low, high)
        return Quantized.from_codes(
            codes.reshape(w.shape),
            scales[..., 0, :].astype(self.scale_dtype),
            None if zeros is None else zeros[..., 0, :],
            bits=self.bits,
            dtype=w.dtype,
        )

    def _range(self, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ends of the range of every group, `[*L, groups, 1, out]`; both include zero."""
        low = jnp.minimum(groups.min(-2, keepdims=True), 0)
        high = jnp.maximum(groups.max(-2, keepdims=True), 0)
        if self.symmetric:
            high = jnp.maximum(-low, high)
            low = -high
        return low, high

    def _round(
        self, groups: jax.Array, low: jax.Array, high: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Codes, scales and zero points of groups `[*L, groups, size, out]` for a range of values."""
        top = 2**self.bits - 1
        if self.symmetric:
            zeros, middle = None, centre(self.bits)
            if self.bits == 1:  # two levels, ±scale/2: the mean magnitude fits them best, and 0 a group of zeros
                scales = (2 * jnp.abs(groups).mean(-2, keepdims=True)).astype(self.scale_dtype).astype(jnp.float32)
                return (groups >= 0).astype(jnp.uint8), scales, None
            scales = self._stored(high / (2 ** (self.bits - 1) - 1))
        else:
            scales = self._stored((high - low) / top)
            zeros = jnp.clip(jnp.round(-low / scales), 0, top)
            middle = zeros
        codes = jnp.clip(jnp.round(groups / scales + middle), 0, top)
        return codes.astype(jnp.uint8), scales, None if zeros is None else zeros.astype(jnp.uint8)

    def _stored(self, scales: jax.Array) -> jax.Array:
        """Scales as they will be read back; a group of zeros gets scale 1."""
        stored = scales.astype(self.scale_dtype).astype(jnp.float32)
        return jnp.where(stored > 0, stored, 1.0)

    def _best_shrink(self, groups: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """For every group the fraction of its range that gives the least squared error."""

        def error(shrink: jax.Array) -> jax.Array:
            codes, scales, zeros = self._round(groups, low * shrink, high * shrink)
            middle = centre(self.bits) if zeros is None else zeros.astype(jnp.float32)
            return jnp.square(scales * (codes.astype(jnp.float32) - middle) - groups).sum(-2, keepdims=True)

        def better(best: tuple[jax.Array, jax.Array], shrink: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            found = error(shrink)
            improved = found < best[0]
            return (jnp.where(improved, found, best[0]), jnp.where(improved, shrink, best[1])), None

        fractions = jnp.linspace(1.0, self.smallest, self.steps, dtype=jnp.float32)
        start = (error(jnp.float32(1)), jnp.ones_like(high))
        return jax.lax.scan(better, start, fractions[1:])[0][1]


def grouped(w: jax.Array, group_size: int | None) -> jax.Array:
    """`[*L, in, out]` as `[*L, groups, group_size, out]`."""
    *lead, n, out = w.shape
    size = n if group_size is None else group_size
    return w.reshape(*lead, n // size, size, out)


def check_groups(shape: tuple[int, ...], group_size: int | None) -> None:
    """Raises LeafError when the inputs are not a whole number of groups."""
    n = shape[-2]
    if group_size is not None and n % group_size:
        divisors = [d for d in (256, 128, 64, 32, 16, 8, 4) if n % d == 0]
        remedy = f"choose group_size from {divisors} or None (per channel)" if divisors else "choose group_size=None"
        raise LeafError(f"group_size={group_size} does not divide its {n} inputs: {remedy} for this leaf with a rule")
