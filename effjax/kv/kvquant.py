"""KVQuant: one table of uneven levels a layer, keys normalised by channel and values by token, outliers kept exact."""

import abc
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.kv.coding import Coded, check_bits, check_calibration, check_whole, pack_codes, unpack_codes
from effjax.kv.integer import check_head_dim
from effjax.quantize.kmeans import nearest, weighted_kmeans
from effjax.quantize.split import split_start

_MOST = 2**17  # numbers that a table is learned from


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Levels(abc.ABC):
    """What keys and values have in common: levels in [-1, 1], and the exact entries of a vector.

    Attributes:
        bits: 1 to 8.
        head_dim: of the vectors.
        outliers: numbers of each vector that are stored exactly, as float16 with their places.
        fisher: weighs numbers by squared gradients.
        q_norm: shifts and stretches the levels so that decoded numbers have the mean and deviation of the original.
        iterations: of k-means at most.
    """

    bits: int = 2
    head_dim: int
    outliers: int = 0
    fisher: bool = True
    q_norm: bool = False
    iterations: int = 50

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        check_whole("head_dim", self.head_dim, 1)
        check_whole("outliers", self.outliers, 0)
        check_whole("iterations", self.iterations, 0)
        if self.outliers >= self.head_dim:
            raise ValueError(f"outliers={self.outliers}: choose fewer than head_dim={self.head_dim}")

    def learn(self, x: Float[Array, "kv_heads tokens head_dim"], grads: Any = None, *, key: Any = None) -> Any:
        """`levels` and `values` `[2**bits]`; of keys also `zero` and `half` `[kv_heads, 1, head_dim]`; all float16."""
        check_calibration(self, x, grads, need_grads=self.fisher)
        check_head_dim(self, x.shape, self.head_dim)
        return _learn(self, x, grads if self.fisher else None)

    @abc.abstractmethod
    def _learned(self, x: Array, grads: Array | None) -> dict[str, Array]:
        """The tables, from float32 vectors."""

    def _levels(self, z: Array, kept: Array, half: Array, grads: Array | None) -> dict[str, Array]:
        """Borders are those of `levels`, decoded numbers those of `values`, both float16 `[2**bits]`."""
        counted = jnp.where(kept, 1.0 if grads is None else jnp.square(grads * half), 0.0)
        # An even choice of numbers: a table of a few levels does not need millions.
        stride = -(-z.size // _MOST)
        points, weights = z.reshape(-1, 1)[::stride], counted.reshape(-1, 1)[::stride]
        start = split_start(points, weights, 2**self.bits)
        table = weighted_kmeans(points, weights, 2**self.bits, start=start, iterations=self.iterations)
        levels = table.astype(jnp.float16)
        if not self.q_norm:
            return {"levels": levels[:, 0], "values": levels[:, 0]}
        _, found = nearest(points, levels.astype(jnp.float32))
        here = kept.reshape(-1, 1)[::stride].astype(jnp.float32)

        def moments(y: Array) -> tuple[Array, Array]:
            mean = jnp.sum(here * y) / jnp.sum(here)
            return mean, jnp.sqrt(jnp.sum(here * jnp.square(y - mean)) / jnp.sum(here))

        (mean, deviation), (mean_found, deviation_found) = moments(points), moments(found)
        stretch = deviation / jnp.where(deviation_found > 0, deviation_found, 1.0)
        values = ((table - mean_found) * stretch + mean).astype(jnp.float16)
        return {"levels": levels[:, 0], "values": values[:, 0]}

    def _encode(self, x: Array, z: Array, far: Array, tables: Any) -> dict[str, Array]:
        codes, _ = nearest(z[..., None], tables["levels"].astype(jnp.float32)[:, None])
        tokens = {"codes": pack_codes(codes[..., 0], self.bits)}
        if self.outliers:
            _, places = jax.lax.top_k(far, self.outliers)
            exact = jnp.take_along_axis(x, places, axis=-1).astype(jnp.float16)
            tokens |= {"places": places.astype(jnp.uint8 if self.head_dim <= 256 else jnp.uint16), "exact": exact}
        return tokens

    def _decode(self, coded: Coded, tables: Any, zero: Array, half: Array) -> Array:
        codes = unpack_codes(coded.tokens["codes"], self.bits, self.head_dim)
        x = zero + half * tables["values"].astype(jnp.float32)[codes]
        if not self.outliers:
            return x
        places, exact = coded.tokens["places"].astype(jnp.int32), coded.tokens["exact"].astype(jnp.float32)
        return jnp.put_along_axis(x, places, exact, axis=-1, inplace=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelKeys(_Levels):
    """Keys before rotation: each channel is normalised by the range it had in the calibration text.

    The range leaves out the share of extremes that `outliers` will keep exact. Slots may move.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (2, 100, 16))
        >>> coding = LevelKeys(bits=2, head_dim=16, outliers=1, fisher=False)
        >>> tables = coding.learn(x)
        >>> {name: part.shape for name, part in coding.encode(x, tables).tokens.items()}
        {'codes': (2, 100, 4), 'places': (2, 100, 1), 'exact': (2, 100, 1)}
    """

    def _learned(self, x: Array, grads: Array | None) -> dict[str, Array]:
        """`levels` and `values`, and `zero` and `half` `[kv_heads, 1, head_dim]`."""
        share = self.outliers / self.head_dim
        low, high = jnp.quantile(x, jnp.array([share / 2, 1 - share / 2]), axis=-2, keepdims=True)
        zero, half = ((low + high) / 2).astype(jnp.float16), ((high - low) / 2).astype(jnp.float16)
        z = _normalised(x, _wide(zero), _wide(half))
        kept = (jnp.abs(z) <= 1) if self.outliers else jnp.ones(z.shape, bool)
        return self._levels(z, kept, _wide(half), grads) | {"zero": zero, "half": half}

    def encode(self, x: Float[Array, "*L kv_heads slots head_dim"], tables: Any) -> Coded:
        check_head_dim(self, x.shape, self.head_dim)
        z = _normalised(x.astype(jnp.float32), _wide(tables["zero"]), _wide(tables["half"]))
        return Coded(tokens=self._encode(x, z, jnp.abs(z), tables))

    def decode(self, coded: Coded, tables: Any) -> Float[Array, "*L kv_heads slots head_dim"]:
        return self._decode(coded, tables, _wide(tables["zero"]), _wide(tables["half"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelValues(_Levels):
    """Values: each token's vector is normalised by its own range, which leaves out the `outliers` farthest of its mean.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (2, 100, 16))
        >>> coding = LevelValues(bits=2, head_dim=16, fisher=False)
        >>> tables = coding.learn(x)
        >>> {name: part.shape for name, part in coding.encode(x, tables).tokens.items()}
        {'codes': (2, 100, 4), 'zero': (2, 100, 1), 'half': (2, 100, 1)}
    """

    def _learned(self, x: Array, grads: Array | None) -> dict[str, Array]:
        """`levels` and `values` alone: scales come with every token."""
        zero, half, kept, _ = self._scales(x)
        return self._levels(_normalised(x, _wide(zero), _wide(half)), kept, _wide(half), grads)

    def encode(self, x: Float[Array, "*L kv_heads slots head_dim"], tables: Any) -> Coded:
        check_head_dim(self, x.shape, self.head_dim)
        zero, half, _, far = self._scales(x.astype(jnp.float32))
        z = _normalised(x.astype(jnp.float32), _wide(zero), _wide(half))
        return Coded(tokens=self._encode(x, z, far, tables) | {"zero": zero, "half": half})

    def decode(self, coded: Coded, tables: Any) -> Float[Array, "*L kv_heads slots head_dim"]:
        return self._decode(coded, tables, _wide(coded.tokens["zero"]), _wide(coded.tokens["half"]))

    def _scales(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Zero and half range as stored, which numbers they are of, and how far each is from its vector's mean."""
        far = jnp.abs(x - jnp.mean(x, axis=-1, keepdims=True))
        kept = jnp.ones(x.shape, bool)
        if self.outliers:
            _, places = jax.lax.top_k(far, self.outliers)
            kept = jnp.put_along_axis(kept, places, False, axis=-1, inplace=False)
        low = jnp.min(jnp.where(kept, x, jnp.inf), axis=-1, keepdims=True)
        high = jnp.max(jnp.where(kept, x, -jnp.inf), axis=-1, keepdims=True)
        return ((low + high) / 2).astype(jnp.float16), ((high - low) / 2).astype(jnp.float16), kept, far


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVQuant:
    """Non-uniform quantization with Fisher-weighted levels (Hooper et al., NeurIPS 2024, sections 3.1 to 3.4).

    One table a layer, keys and values apart, by k-means of the normalised numbers. A number weighs its squared gradient
    times its squared range, since an error in normalised units is that much larger in the loss.

    Differences from the paper: exact entries are the `outliers` farthest of each vector of a head, in place of a share
    of all numbers, so that shapes are static and slots may move (1 of 64 is 1.6 %); values have a range for each head.

    Attributes:
        bits: 1 to 8.
        head_dim: of the vectors.
        outliers: exact entries of every vector: 2 bytes and a place each.
        fisher, q_norm, iterations: see the paper; `q_norm` is meant for 2 bits.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> KVQuant(bits=2, head_dim=64, outliers=1).values.outliers
        1
    """

    bits: int = 2
    head_dim: int
    outliers: int = 0
    fisher: bool = True
    q_norm: bool = False
    iterations: int = 50

    rotated = False

    def __post_init__(self) -> None:
        _ = self.keys  # which checks the fields

    @property
    def keys(self) -> LevelKeys:
        return LevelKeys(**dataclasses.asdict(self))

    @property
    def values(self) -> LevelValues:
        return LevelValues(**dataclasses.asdict(self))


@partial(jax.jit, static_argnums=0)
def _learn(coding: _Levels, x: Array, grads: Array | None) -> dict[str, Array]:
    return coding._learned(x.astype(jnp.float32), grads)


def _normalised(x: Array, zero: Array, half: Array) -> Array:
    return (x - zero) / jnp.where(half > 0, half, 1.0)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
