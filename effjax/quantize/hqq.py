"""HQQ: round to nearest with a real zero point per group, fitted to the weights alone by half-quadratic splitting."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.quantized import Quantized
from effjax.quantize.checks import check_bits, check_floating, check_group_size, check_groups
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.uniform import grouped
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQ(Method):
    """Half-quadratic quantization (Badri and Shaji 2023), data free.

    Minimises `sum |W - W'|^p` over the zero points of a min-max grid. An auxiliary error `E` splits the problem: `E` is
    `W - W'` shrunk by the generalised soft threshold of `l_p`, and the zero point that fits `W - E` best is a mean over
    the group. Only the zero points move, and they are real numbers: `Quantized.zeros` is a floating array.

    Attributes:
        bits: 1 to 8.
        group_size: consecutive inputs that share a scale and a zero point; None is one group a column.
        steps: alternations at most; a matrix stops when its mean `|W - W'|` stops falling.
        p: exponent of the norm, in (0, 1].
        beta: weight of the coupling between `E` and `W - W'` at the start.
        kappa: factor by which `beta` grows every step.
        scale_dtype: dtype of the stored scales and zero points; codes are rounded with what is stored.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (128, 8))
        >>> q = HQQ(bits=3, group_size=64).quantize(w)
        >>> q.bits, q.group_size, q.zeros.dtype.name, q.zeros.shape
        (3, 64, 'float16', (2, 8))
    """

    bits: int = 4
    group_size: int | None = 64
    steps: int = 20
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: 0 (the min-max grid) or more")
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p}: an exponent in (0, 1]")
        if self.beta <= 0 or self.kappa <= 0:
            raise ValueError(f"beta={self.beta}, kappa={self.kappa}: positive numbers")
        check_floating(scale_dtype=self.scale_dtype)

    sums = True

    def check(self, shape: tuple[int, ...]) -> None:
        check_groups(shape, self.group_size)

    def compress(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> Quantized:
        return self.quantize(w)

    def quantize(self, w: Float[Array, "*L in out"]) -> Quantized:
        """Quantizes one weight, or a stack of them one after the other.

        Raises:
            LeafError: the group size does not divide the inputs.
        """
        self.check(w.shape)
        return one_by_one(self._quantize, w)

    def _quantize(self, w: Float[Array, "in out"]) -> Quantized:
        groups = grouped(w.astype(jnp.float32), self.group_size)
        scales = self._scales(groups)
        zeros = self._fit(groups, scales, self._stored(-groups.min(-2, keepdims=True) / scales))
        zeros = self._stored(zeros)
        return Quantized.from_codes(
            self._codes(groups, scales, zeros).astype(jnp.uint8).reshape(w.shape),
            scales[:, 0, :].astype(self.scale_dtype),
            zeros[:, 0, :].astype(self.scale_dtype),
            bits=self.bits,
            dtype=w.dtype,
        )

    def _scales(self, groups: jax.Array) -> jax.Array:
        """Min-max steps `[groups, 1, out]` as they will be read back.

        Not below the spacing of numbers of `scale_dtype` at the group's largest magnitude: a narrow group far from zero
        would otherwise need a zero point that the dtype cannot hold.
        """
        low, high = groups.min(-2, keepdims=True), groups.max(-2, keepdims=True)
        spacing = jnp.maximum(-low, high) * (float(jnp.finfo(self.scale_dtype).eps) / 2)
        stored = self._stored(jnp.maximum((high - low) / (2**self.bits - 1), spacing))
        return jnp.where(stored > 0, stored, 1.0)

    def _fit(self, groups: jax.Array, scales: jax.Array, start: jax.Array) -> jax.Array:
        """Zero points after the alternation, `[groups, 1, out]`."""

        def step(state: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
            zeros, beta, best, going = state
            codes = self._codes(groups, scales, zeros)
            gap = groups - scales * (codes - zeros)
            moved = jnp.mean(codes - (groups - self._shrink(gap, beta)) / scales, -2, keepdims=True)
            error = jnp.abs(gap).mean()
            # As in the reference: the step that finds no smaller error still moves the zero points, and is the last.
            zeros = jnp.where(going, moved, zeros)
            return (zeros, beta * self.kappa, jnp.minimum(best, error), going & (error < best)), None

        state = (start, jnp.float32(self.beta), jnp.float32(jnp.inf), jnp.bool_(True))
        return jax.lax.scan(step, state, length=self.steps)[0][0]

    def _codes(self, groups: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(groups / scales + zeros), 0, 2**self.bits - 1)

    def _shrink(self, x: jax.Array, beta: jax.Array) -> jax.Array:
        """The generalised soft threshold: `sign(x) max(|x| - |x|^(p-1) / beta, 0)`."""
        size = jnp.abs(x)
        power = jnp.where(size > 0, size, 1.0) ** (self.p - 1)
        return jnp.where(size > 0, jnp.sign(x) * jnp.maximum(size - power / beta, 0.0), 0.0)

    def _stored(self, x: jax.Array) -> jax.Array:
        return x.astype(self.scale_dtype).astype(jnp.float32)
