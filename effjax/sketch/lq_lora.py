"""LQ-LoRA and LoftQ: a quantized weight and the low-rank factors that LoRA starts from, found in turns."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.adapter import Adapter
from effjax.arrays.sum import Sum
from effjax.errors import LeafError
from effjax.lift.calibrate import InputStats
from effjax.quantize.checks import check_bits, check_choice, check_floating, check_groups
from effjax.quantize.nf4 import NF4
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.rtn import RTN
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class LqLora(Method):
    """`W = Q + a @ b`, by turns: `Q` quantizes `W - a @ b`, and `a @ b` is the best low rank of `W - Q`.

    LoftQ (Li et al., ICLR 2024, algorithm 1) makes a fixed number of turns, from `a @ b = 0`. LQ-LoRA (Guo et al., ICLR
    2024, section 3.1) begins and measures likewise, and keeps the turn of least error, as here. The factors are an
    `Adapter`, which `effjax.partition_adapters` gives to the optimizer: fine-tuning starts near the dense model, where
    QLoRA (`NF4`, then `effjax.add_lora`) starts at the quantized one.

    Attributes:
        bits: of the quantized part, 1 to 8; 4 for "nf4".
        group_size: inputs that share a scale; None is the whole column.
        grid: "nf4", or "uniform" for `RTN` with the clipping of least squared error.
        rank: of the factors.
        iterations: turns; 0 quantizes alone, with an adapter of zeros in `b`.
        fisher: weigh rows and columns by the means of the root of the Fisher information (LQ-LoRA, section 3.2); needs
            "fisher", see `effjax.calibrate(loss=...)`.
        dtype: of the factors.

    Example:
        >>> import jax
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> leaf = LqLora(rank=4).compress(w)
        >>> [type(part).__name__ for part in leaf.parts], leaf.parts[1].rank
        (['Codebook', 'Adapter'], 4)
    """

    bits: int = 4
    group_size: int | None = 64
    grid: Literal["nf4", "uniform"] = "nf4"
    rank: int = 16
    iterations: int = 5
    fisher: bool = False
    dtype: str = "float32"

    sums = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_choice(("nf4", "uniform"), grid=self.grid)
        if self.grid == "nf4" and self.bits != 4:
            raise ValueError(f"bits={self.bits}: NF4 has 4; write grid='uniform' for other widths")
        if self.rank < 1 or self.iterations < 0:
            raise ValueError(
                f"rank={self.rank}, iterations={self.iterations}: a rank of at least 1, and 0 or more turns"
            )
        check_floating(dtype=self.dtype)
        _ = self.base

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"fisher"}) if self.fisher else frozenset()

    @property
    def base(self) -> NF4 | RTN:
        """The method of the quantized part."""
        if self.grid == "nf4":
            return NF4(block_size=self.group_size)
        return RTN(bits=self.bits, group_size=self.group_size, clip="mse")

    def check(self, shape: tuple[int, ...]) -> None:
        check_groups(shape, self.group_size)
        limit = min(shape[-2:])
        if self.rank > limit:
            raise LeafError(f"rank={self.rank} is above the full rank {limit}: choose a smaller rank")

    def compress(self, w: jax.Array, *, stats: InputStats | None = None, key: Any = None) -> Sum:
        """Takes `w [*L, in, out]`."""
        fisher = jnp.ones(w.shape) if stats is None or not self.fisher else stats.fisher
        return one_by_one(self._compress, w, fisher)

    def _compress(self, w: Float[Array, "in out"], fisher: Float[Array, "in out"]) -> Sum:
        dense, (rows, columns) = w.astype(jnp.float32), _weights(fisher)

        def error(rest: jax.Array) -> jax.Array:
            return jnp.square(rows[:, None] * rest * columns).sum()

        def factors(rest: jax.Array) -> tuple[jax.Array, jax.Array]:
            u, spectrum, v = jnp.linalg.svd(rows[:, None] * rest * columns, full_matrices=False)
            share = jnp.sqrt(spectrum[: self.rank])
            return u[:, : self.rank] * share / rows[:, None], share[:, None] * v[: self.rank] / columns

        def turn(state: Any, _: None) -> tuple[Any, None]:
            (a, b), best, least = state
            base = self.base.quantize(dense - a @ b)
            rest = dense - base.materialize()
            a, b = factors(rest)
            now = error(rest - a @ b)
            kept = jax.tree.map(lambda new, old: jnp.where(now < least, new, old), (base, a, b), best)
            return ((a, b), kept, jnp.minimum(now, least)), None

        base = self.base.quantize(dense)
        a, b = factors(dense - base.materialize())
        first = (base, a, jnp.zeros_like(b))  # QLoRA's start, should no turn be better
        zero = jnp.zeros_like(a), jnp.zeros_like(b)
        state = (zero, first, error(dense - base.materialize()))
        (_, (base, a, b), _), _ = jax.lax.scan(turn, state, length=self.iterations)
        adapter = Adapter(a=a.astype(self.dtype), b=b.astype(self.dtype), dtype=w.dtype)
        return Sum(parts=(base.astype(w.dtype), adapter))


def _weights(fisher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means of the root of the Fisher diagonal by row and by column, over their mean."""
    root = jnp.sqrt(fisher)
    mean = jnp.maximum(root.mean(), 1e-30)
    # A row or column that the loss does not depend on must still be divided by.
    return jnp.maximum(root.mean(1) / mean, 1e-3), jnp.maximum(root.mean(0) / mean, 1e-3)
