"""Random parameter sharing: every weight reads a hashed slot of a small table."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.hashed import Hashed as HashedArray
from effjax.arrays.hashed import slots_and_signs
from effjax.errors import LeafError
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hashed(Method):
    """Hashing trick for weights (HashedNets, Chen et al. 2015) with ROBE's blocks (Desai et al. 2022).

    The table starts at the least-squares fit of the dense weight: each slot is the mean of its entries with their
    signs. Hashing alone throws most of a trained weight away; it is meant to be trained.

    Attributes:
        ratio: weights a slot stands for; the table has `ceil(in * out / ratio)` slots.
        block: consecutive columns that share one hash and lie side by side in the table.
    """

    needs_key = True
    sums = True

    ratio: float = 8.0
    block: int = 1

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: at least 1 weight a slot")
        if self.block < 1:
            raise ValueError(f"block={self.block}: at least 1")

    def check(self, shape: tuple[int, ...]) -> None:
        if self._slots(shape) < self.block:
            raise LeafError(
                f"ratio={self.ratio:g} leaves fewer slots than a block of {self.block}: choose a smaller one"
            )

    def _slots(self, shape: tuple[int, ...]) -> int:
        return math.ceil(shape[-2] * shape[-1] / self.ratio)

    def compress(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> HashedArray:
        *lead, n, out = w.shape
        slots = self._slots(w.shape)
        seed = jax.random.bits(key, tuple(lead), jnp.uint32)

        def fit(w: jax.Array, seed: jax.Array) -> jax.Array:
            slot, sign = slots_and_signs(seed, jnp.arange(n), out, slots, self.block)
            total = jnp.zeros(slots).at[slot].add(sign * w)
            count = jnp.zeros(slots).at[slot].add(1.0)
            return total / jnp.maximum(count, 1)

        for _ in lead:
            fit = jax.vmap(fit)
        table = fit(w.astype(jnp.float32), seed).astype(w.dtype)
        return HashedArray(table=table, seed=seed, in_features=n, out_features=out, block=self.block, dtype=w.dtype)
