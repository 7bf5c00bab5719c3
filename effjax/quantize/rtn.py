"""Round to nearest: the data-free baseline, with the full range or the clipping that minimises the squared error."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.quantized import Quantized
from effjax.quantize.checks import check_group_size, check_groups
from effjax.quantize.uniform import Clip, Grid, UniformGrid, grouped
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
        clip: "absmax" spans the whole range; "full" lets a symmetric grid use its lowest code too; "mse" tries `steps`
            smaller ranges down to `smallest` of it and keeps, for every group, the one of least squared error.
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
    clip: Clip = "absmax"
    steps: int = 40
    smallest: float = 0.4
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        _ = self.grid

    @property
    def grid(self) -> UniformGrid:
        """The grid of a group, without its values."""
        return UniformGrid(**{f.name: getattr(self, f.name) for f in dataclasses.fields(UniformGrid)})

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return self.grid.sums

    @property
    def by_column(self) -> bool:
        """Whether a run of outputs gets the bytes it has in the whole weight, so that a large one may be cut."""
        return not self.sums

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
        grid = self.grid.fit(groups)
        return as_quantized(self.grid.round(groups, grid).reshape(w.shape), grid, self.grid, w.dtype)


def as_quantized(codes: jax.Array, grid: Grid, kind: UniformGrid, dtype: Any) -> Quantized:
    """The compressed array of codes `[*L, in, out]` on grids `[*L, groups, 1, out]`."""
    scales, zeros = grid
    return Quantized.from_codes(
        codes,
        scales[..., 0, :].astype(kind.scale_dtype),
        None if zeros is None else zeros[..., 0, :].astype(jnp.uint8),
        bits=kind.bits,
        dtype=dtype,
    )
