"""SpaLLM (SketchTune): weights as entries of small tables, one a column and slice of the inputs, which are tuned."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from effjax.arrays.codebook import Codebook
from effjax.errors import LeafError
from effjax.lift.calibrate import InputStats
from effjax.quantize.checks import check_bits, check_choice, check_floating, check_size
from effjax.quantize.gptq import SecondOrder, SweepFactor
from effjax.quantize.kmeans import nearest
from effjax.quantize.leanquant import group_of_row, importance, learned_tables
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.sweep import sweep
from effjax.quantize.uniform import grouped
from effjax.sketch.refit import refit_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaLLM(SecondOrder):
    """Sketches to fine-tune (Zhang et al., SpaLLM, arXiv 2410.06364 v1; SketchTune, ICML 2025).

    Every output has `groups` tables of `2**bits` values, each for a run of `in / groups` inputs, and every weight a
    code that names an entry. Codes are frozen; the tables are all there is to train: `groups * 2**bits` values an
    output, and an update of full rank without a second matrix beside the first. The same leaf is the compressed model
    and its adapter, and the tables of several users go over one set of codes (`effjax.sketch.stack_tables`).

    The tables begin as the centres of a weighted k-means of the weights, with the importance `U[j, j]**-p` of their
    inputs, and the codes are chosen in the sweep of GPTQ, as in `LeanQuant`, whose parts these are; the program that
    made the paper's sketches is not published, but its files are LeanQuant's with an axis of groups. The codes chosen,
    the entries move to where they lose least on the calibrated inputs (`refit`, which is not the paper's). A leaf takes
    `bits + 16 * groups * 2**bits / in` bits a weight.

    Needs the second moments of the inputs: `stats=effjax.calibrate(fn, params, batches, needs=method.needs)`; without
    them there is plain k-means (`calibrated=False`), from which training starts much further off at 2 and 3 bits.

    Attributes:
        bits: 1 to 8; the paper's is 4.
        groups: tables an output (the paper's groups per row, 1 to 8, mostly 4); runs of inputs in the matrix's order,
            also with `act_order`. It must divide the inputs and leave a table at least as many inputs as entries.
        calibrated: False ignores the inputs: equal weights in the k-means, and plain rounding.
        p: see above; the paper's LeanQuant takes 3 or 4.
        refit: steps of that least-squares fit, each a product with the second moments; 0 leaves the centres of the
            k-means, as the paper does.
        start, iterations, tolerance: of the k-means, see `LeanQuant`.
        table_dtype: dtype the tables are stored in; weights are rounded to the stored entries.
        damping, act_order: see `SecondOrder`.

    Example:
        >>> import effjax as ej
        >>> x = jax.random.normal(jax.random.key(0), (256, 64))
        >>> params = {"kernel": jax.random.normal(jax.random.key(1), (64, 32))}
        >>> method = SpaLLM(bits=2, groups=4)
        >>> stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [x], needs=method.needs)
        >>> sketched = ej.sketch_params(params, method, stats=stats)
        >>> tables, codes = ej.partition(sketched)
        >>> tables["kernel"].tables.shape, codes["kernel"].codes.shape, sketched["kernel"].bits_per_weight
        ((4, 32, 4), (16, 32), 6.0)
    """

    bits: int = 4
    groups: int = 1
    calibrated: bool = True
    p: float = 2.0
    damping: float = 0.1
    act_order: bool = False
    start: Literal["split", "even"] = "split"
    iterations: int = 100
    tolerance: float = 1e-6
    refit: int = 10
    table_dtype: str = "float16"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return SecondOrder.needs if self.calibrated else frozenset()

    def __post_init__(self) -> None:
        self.check_damping()
        check_bits(self.bits)
        check_size("tables an output, 1 or more", groups=self.groups)
        check_choice(("split", "even"), start=self.start)
        if self.iterations < 1 or self.refit < 0 or not self.p >= 0:
            raise ValueError(
                f"iterations={self.iterations}, refit={self.refit}, p={self.p}: at least one iteration, 0 or more "
                "steps and an exponent of 0 or more"
            )
        check_floating(table_dtype=self.table_dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        n, entries = shape[-2], 2**self.bits
        if n % self.groups or n // self.groups < entries:
            fitting = [g for g in range(1, 65) if n % g == 0 and n // g >= entries]
            remedy = f"choose groups from {fitting}" if fitting else "choose fewer bits"
            raise LeafError(
                f"groups={self.groups} must divide its {n} inputs into runs of at least {entries}, the entries of a "
                f"table: {remedy} for this leaf with a rule"
            )

    def compress(self, w: jax.Array, *, stats: InputStats | None = None, key: Any = None) -> Codebook:
        """Sketches `w [*L, in, out]`: tables `[*L, groups, out, 2**bits]`."""
        if self.calibrated:
            assert stats is not None  # `needs` asks for them
            return one_by_one(self._compress, w, self.factor_of(stats), stats.second_moment)
        *lead, n, _ = w.shape
        eye = jnp.broadcast_to(jnp.eye(n), (*lead, n, n))
        return one_by_one(self._compress, w, SweepFactor(eye, None, jnp.zeros((*lead, n), bool)), eye)

    def prepare(self, stats: InputStats) -> InputStats:
        return super().prepare(stats) if self.calibrated else stats

    def _compress(self, w: jax.Array, factor: SweepFactor, moment: jax.Array) -> Codebook:
        (n, out), rows, size = w.shape, factor.in_order(w), len(w) // self.groups
        shares = jnp.where(factor.dead, 0, factor.back(importance(factor.upper, self.p))).reshape(-1, size)
        points = jnp.swapaxes(grouped(factor.back(rows), size), 0, 1).reshape(size, -1)
        weights = jnp.repeat(shares.T, out, axis=1)
        found = jnp.moveaxis(learned_tables(self, points, weights).reshape(-1, self.groups, out), 1, 0)
        group = group_of_row(factor, n, size)
        codes = factor.back(sweep(rows, factor.upper, nearest, grid_of_row=lambda j: found[group[j]]).codes)
        tables = jnp.swapaxes(found, 1, 2)
        if self.refit and self.calibrated:
            damped = moment + self.damping * jnp.diagonal(moment).mean() * jnp.eye(n)
            tables = refit_tables(factor.back(rows), codes, tables, damped, self.refit)
        return Codebook.from_codes(codes, tables.astype(self.table_dtype), dtype=w.dtype)
