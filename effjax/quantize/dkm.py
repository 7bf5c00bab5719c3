"""DKM: weights as soft mixtures of k-means centroids, differentiable; and its hard, post-training form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.codebook import Codebook
from effjax.errors import LeafError
from effjax.quantize.centroids import kmeans, nearest
from effjax.quantize.checks import check_bits, check_choice, check_size
from effjax.quantize.one_by_one import one_by_one
from effjax.transform import Method

DEAD = 1e-20  # a centroid that gathers less weight than this stays where it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class DKM(Method):
    """Differentiable k-means clustering (DKM, Cho et al. 2022, section 3).

    As a method of `quantize_params` it is post-training k-means: the tables of least squared error, codes of the
    nearest entries. For training, `init_clusters`, `palettize` and `harden` take the same object.

    Attributes:
        bits: 1 to 8; a table has `2**bits` entries.
        tau: temperature of the soft assignment. Large: weights are pulled to the mean; small: assignment is hard and
            gradients to the centroids vanish.
        relative: whether `tau` is in units of the variance of the weights that share a table, measured once by
            `init_clusters`; otherwise in units of squared weights.
        iterations: k-means iterations a step, differentiated through. (The released code of the paper stops early by a
            tolerance; a fixed number keeps shapes and programs static.)
        group_columns: consecutive outputs that share a table; None is one table a matrix.
        round_to: "bfloat16" or "float16" rounds the weights first, straight through for the gradient; None does not.

    Example:
        >>> import jax
        >>> q = DKM(bits=2).quantize(jax.random.normal(jax.random.key(0), (64, 8)))
        >>> q.bits, q.tables.shape, q.shape
        (2, (1, 1, 4), (64, 8))
    """

    bits: int = 4
    tau: float = 0.25
    relative: bool = True
    iterations: int = 3
    group_columns: int | None = None
    round_to: str | None = None

    sums = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau}: a positive temperature")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: at least one")
        check_size("a positive number, or None for one table a matrix", group_columns=self.group_columns)
        check_choice(("bfloat16", "float16", None), round_to=self.round_to)

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return 2**self.bits

    def check(self, shape: tuple[int, ...]) -> None:
        if self.group_columns is not None and shape[-1] % self.group_columns:
            divisors = [d for d in (256, 128, 64, 32, 16, 8, 4, 2) if shape[-1] % d == 0]
            raise LeafError(
                f"group_columns={self.group_columns} does not divide its {shape[-1]} outputs: choose one of "
                f"{divisors} or None (one table a matrix) for this leaf with a rule"
            )

    def compress(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> Codebook:
        return self.quantize(w)

    def quantize(self, w: Float[Array, "*L in out"]) -> Codebook:
        """Post-training k-means of one weight.

        Raises:
            LeafError: the columns cannot be grouped.
        """
        self.check(w.shape)
        parts = split(w, self.group_columns)
        tables = one_by_one(lambda part: kmeans(part.astype(jnp.float32).reshape(-1), self.entries), parts)
        return harden_matrix(w, tables)

    def soft(self, w: jax.Array, centroids: jax.Array, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Soft weights and updated centroids of the weights of one table; differentiable."""
        if self.round_to is not None and w.dtype == jnp.float32:
            w = w + jax.lax.stop_gradient(w.astype(self.round_to).astype(w.dtype) - w)
        return dkm_soft(w, centroids, tau, self.iterations)


def dkm_soft(
    w: Float[Array, "..."], centroids: Float[Array, "K *dim"], tau: Any, iterations: int = 3
) -> tuple[Float[Array, "..."], Float[Array, "K *dim"]]:
    """Soft k-means as DKM defines it: every iteration forms the map of all weights times all centroids.

    `D = |w - c|²`, `A = softmax(-D / tau)`, `c = sum(A w) / sum(A)`; the result is `A c` with the last `A` and `c`.

    Args:
        w: weights of one table, any shape; with vector centroids `[*S, dim]`.
        centroids: `[K]`, or `[K, dim]` for vectors of weights.
        tau: temperature, in units of squared weights.
        iterations: at least 1.

    Returns:
        Soft weights of the shape and dtype of `w`, and the updated centroids (float32, or float64 as `w` is).

    Example:
        >>> import jax.numpy as jnp
        >>> soft, centroids = dkm_soft(jnp.array([-1.0, -0.9, 0.9, 1.0]), jnp.array([-0.5, 0.5]), 1e-2)
        >>> [round(c, 2) for c in centroids.tolist()]
        [-0.95, 0.95]
    """
    if iterations < 1:
        raise LeafError(f"iterations={iterations}: at least one")
    c = jnp.asarray(centroids, jnp.promote_types(w.dtype, jnp.float32))
    if c.ndim == 2 and w.shape[-1:] != c.shape[-1:]:
        raise LeafError(f"weights {list(w.shape)} are no vectors of {c.shape[-1]}, as the centroids are")
    x = w.reshape(-1, *c.shape[1:]).astype(c.dtype)
    shares = jnp.zeros((x.shape[0], c.shape[0]), c.dtype)
    for _ in range(iterations):
        off = x[:, None] - c
        distance = jnp.square(off) if c.ndim == 1 else jnp.square(off).sum(-1)
        shares = jax.nn.softmax(-distance / tau, axis=1)
        mass = shares.sum(0).reshape(-1, *(1,) * (c.ndim - 1))
        gathered = (shares * x[:, None]).sum(0) if c.ndim == 1 else shares.T @ x
        c = jnp.where(mass > DEAD, gathered / jnp.where(mass > DEAD, mass, 1), c)
    return (shares @ c).reshape(w.shape).astype(w.dtype), c


def harden_matrix(w: Float[Array, "*L in out"], tables: Float[Array, "*L groups K"]) -> Codebook:
    """Every weight becomes the nearest entry of its table.

    Example:
        >>> import jax.numpy as jnp
        >>> harden_matrix(jnp.array([[0.1], [0.9]]), jnp.array([[1.0, 0.0]])).materialize().ravel().tolist()
        [0.0, 1.0]
    """
    tables = jnp.sort(tables.astype(jnp.float32), axis=-1)
    *lead, n, out = w.shape
    groups = tables.shape[-2]
    columns = w.astype(jnp.float32).reshape(*lead, n, groups, out // groups)
    codes = nearest(columns, tables[..., None, :, :])
    return Codebook.from_codes(codes.reshape(w.shape), tables[..., None, :, :], dtype=w.dtype)


def split(w: Float[Array, "*L in out"], group_columns: int | None) -> Float[Array, "*L groups in columns"]:
    """The parts of a weight that have a table each."""
    *lead, n, out = w.shape
    columns = out if group_columns is None else group_columns
    return jnp.swapaxes(w.reshape(*lead, n, out // columns, columns), -3, -2)


def join(parts: Float[Array, "*L groups in columns"]) -> Float[Array, "*L in out"]:
    """Inverse of `split`."""
    *lead, groups, n, columns = parts.shape
    return jnp.swapaxes(parts, -3, -2).reshape(*lead, n, groups * columns)


def map_tables(fn: Any, parts: Float[Array, "*L groups in columns"], *rest: jax.Array) -> Any:
    """`fn` on every table's weights (and what goes with them), one after the other."""
    lead = parts.shape[:-2]
    flat = [x.reshape(-1, *x.shape[len(lead) :]) for x in (parts, *rest)]
    if flat[0].shape[0] == 1:
        result = jax.tree.map(lambda y: y[None], fn(*(x[0] for x in flat)))
    else:
        result = jax.lax.map(lambda xs: fn(*xs), tuple(flat))
    return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), result)
