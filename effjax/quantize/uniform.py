"""The uniform grid of a group of weights: how its range is found, and how values are rounded to it."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from effjax.arrays.quantized import centre
from effjax.quantize.checks import check_bits, check_choice, check_floating

Clip = Literal["absmax", "full", "mse"]
Grid = tuple[jax.Array, jax.Array | None]  # scales and zero points, float32[*L, 1, out]; None where symmetric


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformGrid:
    """`value = scale * (code - zero)` with codes in `[0, 2**bits)`.

    Groups are `[*L, size, out]`: one grid for the `size` inputs of every output. Asymmetric grids span
    `[min(0, min w), max(0, max w)]` with an integer zero point.

    Attributes:
        bits: 1 to 8.
        symmetric: whether the grid is centred at zero, with zero point `2**(bits-1)`.
        clip: "absmax" spans the whole range, in a symmetric grid with `scale = max|w| / (2**(bits-1) - 1)`; "full" is
            `scale = 2 max|w| / (2**bits - 1)` there, which uses all codes and clips the largest weight of one sign by
            half a step (GPTQ's and compressed-tensors' rule); "mse" tries `steps` smaller ranges down to `smallest` of
            it and keeps, for every group, the one of least squared error.
        steps, smallest: see `clip`.
        scale_dtype: dtype the scales are stored in; codes are rounded with the stored scale.

    Raises:
        ValueError: a field out of its range.
    """

    bits: int
    symmetric: bool = False
    clip: Clip = "absmax"
    steps: int = 40
    smallest: float = 0.4
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_choice(get_args(Clip), clip=self.clip)
        if self.steps < 1 or not 0 < self.smallest <= 1:
            raise ValueError(f"steps={self.steps}, smallest={self.smallest}: at least one step, a fraction in (0, 1]")
        check_floating(scale_dtype=self.scale_dtype)

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def sums(self) -> bool:
        """Whether the grid depends on the order of sums over a group."""
        return self.clip == "mse" or (self.bits == 1 and self.symmetric)

    def fit(self, groups: Float[Array, "*L size out"]) -> Grid:
        """The grid of every group."""
        low, high = self._range(groups)
        if self.clip == "mse":
            shrink = self._best_shrink(groups, low, high)
            low, high = low * shrink, high * shrink
        return self.spanning(groups, low, high)

    def spanning(self, groups: Float[Array, "*L size out"], low: jax.Array, high: jax.Array) -> Grid:
        """The grid of a range of values `[*L, 1, out]`; two symmetric levels come from the group itself."""
        if not self.symmetric:
            scales = self.stored((high - low) / self.top)
            return scales, jnp.clip(jnp.round(-low / scales), 0, self.top)
        if self.bits == 1:  # two levels, ±scale/2: the mean magnitude fits them best, and 0 a group of zeros
            mean = jnp.abs(groups).mean(-2, keepdims=True)
            return (2 * mean).astype(self.scale_dtype).astype(jnp.float32), None
        if self.clip == "full":
            # The largest weight lies half-way between two codes, and the last digit of the scale decides to which it
            # goes. So this must be a division, and not the product with a rounded reciprocal that the compiler makes
            # where it can see that the divisor is a constant.
            divisor = jnp.where(jnp.isnan(high), high, self.top)
            return self.stored(2 * high / divisor), None
        return self.stored(high / (2 ** (self.bits - 1) - 1)), None

    def round(self, w: Float[Array, "*L size out"], grid: Grid) -> UInt8[Array, "*L size out"]:
        """The nearest codes."""
        scales, zeros = grid
        if self.symmetric and self.bits == 1:
            return (w >= 0).astype(jnp.uint8)
        middle = centre(self.bits) if zeros is None else zeros
        return jnp.clip(jnp.round(w / scales + middle), 0, self.top).astype(jnp.uint8)

    def values(self, codes: UInt8[Array, "*L size out"], grid: Grid) -> Float[Array, "*L size out"]:
        """What codes stand for."""
        scales, zeros = grid
        return scales * (codes.astype(jnp.float32) - (centre(self.bits) if zeros is None else zeros))

    def stored(self, scales: jax.Array) -> jax.Array:
        """Scales as they will be read back; a group of zeros gets scale 1."""
        stored = scales.astype(self.scale_dtype).astype(jnp.float32)
        return jnp.where(stored > 0, stored, 1.0)

    def _range(self, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ends of the range of every group, `[*L, 1, out]`; both include zero."""
        low = jnp.minimum(groups.min(-2, keepdims=True), 0)
        high = jnp.maximum(groups.max(-2, keepdims=True), 0)
        if self.symmetric:
            high = jnp.maximum(-low, high)
            low = -high
        return low, high

    def _best_shrink(self, groups: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """For every group the fraction of its range that gives the least squared error."""

        def error(shrink: jax.Array) -> jax.Array:
            grid = self.spanning(groups, low * shrink, high * shrink)
            return jnp.square(self.values(self.round(groups, grid), grid) - groups).sum(-2, keepdims=True)

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
