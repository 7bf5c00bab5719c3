"""CQ: channels that depend on each other share a code, the index of a vector in a learned codebook."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from effjax.errors import ConfigError
from effjax.kv.coding import Coded, check_bits, check_calibration, check_whole, pack_codes, unpack_codes
from effjax.kv.vector_kmeans import vector_kmeans
from effjax.quantize.checks import check_floating

Codebooks = Float[Array, "kv_heads groups entries channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CQ:
    """Coupled quantization of keys (before rotation) and values (Zhang et al., NeurIPS 2024, section 3).

    The channels of a head are cut into runs of `channels`, and each run has a codebook of `2**bits` centres. A token's
    code in a run is the index of the nearest centre, unweighted; `CQ(channels=8, bits=8)` is the paper's 8c8b, one bit
    a channel. Centres are those of k-means over a calibration text. With `fisher` a token counts in a run by the
    squared norm of the loss's gradient with respect to those channels, so that errors go where the loss does not feel
    them; weights are normalised to mean 1. Centres need some 50 tokens each, or they fit the calibration text alone.

    Attributes:
        channels: that share a code; must divide head_dim.
        bits: of a code, 1 to 10. Codes of up to 8 bits are packed, longer ones take 16.
        fisher: weighs tokens; False counts all alike.
        by_channel: with `fisher`, a centre is the mean of its tokens channel by channel, each weighed by the square of
            its own derivative, the diagonal of the Fisher matrix, instead of by their sum over the run.
        iterations: of k-means at most.
        table_dtype: of the stored centres; codes are those of the nearest stored one.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> method = CQ(channels=2, bits=3)
        >>> x = jax.random.normal(jax.random.key(0), (1, 200, 8))
        >>> books = method.learn(x, jnp.ones_like(x), key=jax.random.key(1))
        >>> books.shape, str(method)
        ((1, 4, 8, 2), 'CQ-2c3b')
        >>> coded = method.encode(x, books)
        >>> coded.tokens["codes"].shape, method.decode(coded, books).shape
        ((1, 200, 2), (1, 200, 8))

    Source: Zhang, Yi, Xu and Shrivastava, KV Cache is 1 Bit Per Channel (2024); k-means++ start and Lloyd's steps as in
    KVQuant (Hooper et al. 2024).
    """

    channels: int = 8
    bits: int = 8
    fisher: bool = True
    by_channel: bool = False
    iterations: int = 50
    table_dtype: str = "float16"

    rotated = False

    def __post_init__(self) -> None:
        check_whole("channels", self.channels, 1)
        check_bits("bits", self.bits, 10)
        check_whole("iterations", self.iterations, 0)
        check_floating(table_dtype=self.table_dtype)

    def __str__(self) -> str:
        return f"CQ-{self.channels}c{self.bits}b"

    @property
    def keys(self) -> "CQ":
        return self

    @property
    def values(self) -> "CQ":
        return self

    def learn(
        self,
        x: Float[Array, "kv_heads tokens head_dim"],
        grads: Float[Array, "kv_heads tokens head_dim"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Codebooks:
        """Codebooks of one layer's keys or values.

        Args:
            x: the vectors of a calibration text, keys before rotation.
            grads: of the loss with respect to them, for `fisher`.
            key: of the draws of k-means++; `jax.random.key(0)` where None.

        Returns:
            Centres in `table_dtype`.

        Raises:
            ConfigError: `channels` does not divide head_dim, gradients are missing, or shapes differ.
        """
        check_calibration(self, x, grads, need_grads=self.fisher)
        groups = self._groups(x.shape[-1])
        return _learn(self, groups, x, grads if self.fisher else None, jax.random.key(0) if key is None else key)

    def encode(self, x: Float[Array, "*L kv_heads slots head_dim"], tables: Codebooks) -> Coded:
        """The index of each run's nearest centre, by distances in float32.

        Raises:
            ConfigError: `channels` does not divide head_dim, or the codebooks are others'.
        """
        groups = self._groups(x.shape[-1])
        wanted = (x.shape[-3], groups, 2**self.bits, self.channels)
        if tables.shape != wanted:
            raise ConfigError(f"{self}: vectors of shape {x.shape} need codebooks {wanted}, found {tables.shape}")
        codes = nearest_centres(x.reshape(*x.shape[:-1], groups, self.channels), tables)
        return Coded(tokens={"codes": pack_codes(codes, self.bits)})

    def decode(self, coded: Coded, tables: Codebooks) -> Float[Array, "*L kv_heads slots head_dim"]:
        """The centres that codes stand for, float32."""
        codes = unpack_codes(coded.tokens["codes"], self.bits, tables.shape[1]).astype(jnp.int32)
        at = jnp.moveaxis(codes, (-3, -1), (0, 1))  # [kv_heads, groups, *L, slots]
        found = jax.vmap(jax.vmap(lambda book, index: book[index]))(tables.astype(jnp.float32), at)
        found = jnp.moveaxis(found, (0, 1), (-4, -2))  # [*L, kv_heads, slots, groups, channels]
        return found.reshape(*found.shape[:-2], -1)

    def _groups(self, head_dim: int) -> int:
        if head_dim % self.channels:
            divisors = [d for d in range(1, head_dim + 1) if head_dim % d == 0]
            raise ConfigError(
                f"{self}: channels={self.channels} does not divide head_dim {head_dim}; choose channels from {divisors}"
            )
        return head_dim // self.channels


@partial(jax.jit, static_argnums=(0, 1))
def _learn(method: CQ, groups: int, x: Array, grads: Array | None, key: Any) -> Codebooks:
    heads, tokens, _ = x.shape

    def runs(y: Array) -> Array:
        cut = y.astype(jnp.float32).reshape(heads, tokens, groups, method.channels).swapaxes(1, 2)
        return cut.reshape(heads * groups, tokens, method.channels)

    def one(run: tuple[Array, Array, Array]) -> Array:
        points, slopes, key = run
        # The largest gradient is taken out first: squares of what a loss of thousands of tokens gives may underflow.
        largest = jnp.max(jnp.abs(slopes))
        slopes = slopes / jnp.where(largest > 0, largest, 1.0)
        weights = jnp.square(slopes) if method.by_channel else jnp.sum(jnp.square(slopes), axis=-1)
        return vector_kmeans(points, weights, 2**method.bits, key=key, iterations=method.iterations)

    points = runs(x)
    slopes = jnp.ones_like(points) if grads is None else runs(grads)
    books = jax.lax.map(one, (points, slopes, jax.random.split(key, heads * groups)))
    return books.reshape(heads, groups, *books.shape[1:]).astype(method.table_dtype)


def nearest_centres(
    x: Float[Array, "*L kv_heads slots groups channels"], books: Codebooks
) -> Int[Array, "*L kv_heads slots groups"]:
    """The first of the nearest centres, group by group, so that the distances of one group are all that is held.

    In float32: `|a|^2 - 2 a.c + |c|^2` in bfloat16 would flip codes. Both sides are moved by the mean of the centres
    for the same reason.
    """
    books = books.astype(jnp.float32)
    middle = jnp.mean(books, axis=2)  # [kv_heads, groups, channels]
    moved = x.astype(jnp.float32) - jnp.expand_dims(middle, 1)
    books = books - middle[:, :, None]

    def one(group: tuple[Array, Array]) -> Array:
        x, book = group
        halves = jnp.sum(jnp.square(book), axis=-1)[:, None] / 2
        near = jnp.einsum("...hsc,hkc->...hsk", x, book, precision="highest")
        return jnp.argmin(halves - near, axis=-1).astype(jnp.int32)

    codes = jax.lax.map(one, (jnp.moveaxis(moved, -2, 0), jnp.moveaxis(books, 1, 0)))
    return jnp.moveaxis(codes, 0, -1)
