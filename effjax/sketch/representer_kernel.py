"""Stage one of the Representer Sketch: a network distilled into a weighted sum of collision probabilities."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from effjax.hashing import lsh

Kind = Literal["euclidean", "angular"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RepresenterKernel:
    """`f(q) = sum_j alpha_j k(x_j, q A) + bias` (Liu et al., "Efficient Inference via Universal LSH Kernel", 2021).

    `k` is the probability that a locality-sensitive hash does not tell two vectors apart, so that counts of hashes can
    stand for the sum. Every field is trainable.

    Attributes:
        projection: `A`, `float[in, dim]`.
        points: the representers `x_j`, `float[points, dim]`.
        alpha: their weights, `float[points, outputs]`.
        bias: `float[outputs]`.
        kind: "euclidean" for intervals of projections, "angular" for their signs.
        width: of the intervals; the larger, the smoother the kernel and the smaller the noise of a sketch.
        hashes: that must all agree; the more, the narrower the kernel.
    """

    projection: Shaped[Array, "in dim"]
    points: Shaped[Array, "points dim"]
    alpha: Shaped[Array, "points outputs"]
    bias: Shaped[Array, " outputs"]
    kind: Kind = dataclasses.field(default="euclidean", metadata={"static": True})
    width: float = dataclasses.field(default=1.5, metadata={"static": True})
    hashes: int = dataclasses.field(default=2, metadata={"static": True})

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch outputs"]:
        """The exact sum."""
        return self.collisions(x @ self.projection) @ self.alpha + self.bias

    def collisions(self, z: Float[Array, "*batch dim"]) -> Float[Array, "*batch points"]:
        """The kernel of projected queries and every representer."""
        z = z[..., None, :]
        if self.kind == "angular":
            return lsh.angular_collision(lsh.angle(z, self.points), self.hashes)
        return lsh.euclidean_collision(lsh.distance(z, self.points), self.width, self.hashes)


def init_representer(
    key: jax.Array,
    inputs: Float[Array, "n in"],
    *,
    outputs: int,
    dim: int,
    points: int,
    kind: Kind = "euclidean",
    width: float = 1.5,
    hashes: int = 2,
    projection: Float[Array, "in dim"] | None = None,
) -> RepresenterKernel:
    """A kernel to be trained: representers at projected inputs, small random weights.

    Args:
        key: for the draw.
        inputs: of the network, at least one; representers are drawn from them, and the projection is scaled so that
            two of them are about a `width` apart.
        outputs: of the network.
        dim: of the projection, 2 to 16 as a rule.
        points: number of representers; a sketch does not grow with it.
        kind, width, hashes: of the kernel.
        projection: to begin with, up to its scale; None for a Gaussian one. A kernel hardly sees what is far, and many
            inputs need long until they have taught it where to look: the first layer of a network that was distilled
            through a linear layer of `dim` is a better start than noise.

    Raises:
        ValueError: a size that is not positive, an unknown kind, or a projection of another shape.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (100, 20))
        >>> init_representer(jax.random.key(1), x, outputs=3, dim=4, points=50)(x).shape
        (100, 3)
    """
    for name, value in {"outputs": outputs, "dim": dim, "points": points, "width": width, "hashes": hashes}.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: a positive number")
    if kind not in ("euclidean", "angular"):
        raise ValueError(f"kind={kind!r}: choose 'euclidean' or 'angular'")
    for_projection, for_points, for_alpha = jax.random.split(key, 3)
    n, features = inputs.shape
    if projection is None:
        projection = jax.random.normal(for_projection, (features, dim))
    elif projection.shape != (features, dim):
        raise ValueError(f"projection of shape {projection.shape}: must be ({features}, {dim}), inputs by dim")
    z = inputs @ projection
    apart = jnp.sqrt(2 * jnp.sum(jnp.var(z, axis=0)) + 1e-12)
    scale = width / apart
    chosen = jax.random.choice(for_points, n, (points,), replace=points > n)
    return RepresenterKernel(
        projection=projection * scale,
        points=z[chosen] * scale,
        alpha=jax.random.normal(for_alpha, (points, outputs)) / math.sqrt(points),
        bias=jnp.zeros(outputs),
        kind=kind,
        width=width,
        hashes=hashes,
    )


def distillation_loss(
    kernel: RepresenterKernel,
    x: Float[Array, "batch in"],
    targets: Float[Array, "batch outputs"],
    *,
    spread: float | Float[Array, ""] = 0.0,
    norm: float | Float[Array, ""] = 0.0,
) -> tuple[Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """The squared error of the kernel, and what a sketch of it will add.

    A sketch of `L` rows and `R` columns errs by at most `f~(q)**2 / L` (mean square), with
    `f~(q) = sum_j |alpha_j| sqrt(k(x_j, q))`, and by about `alpha' K alpha / (L R)` from representers that only share a
    column: with `spread = 1 / L` and `norm = 1 / (L R)` the loss bounds the error of the sketch. Clip logits of the
    network before: all of these grow with their scale.

    Args:
        kernel: to be trained; pass the loss to `jax.value_and_grad(..., has_aux=True)`.
        x: inputs, noise added to them if wanted.
        targets: the network's outputs for them.
        spread: weight of the mean of `f~**2`.
        norm: weight of `alpha' K alpha`.

    Returns:
        The loss, and the metrics "squared_error", "spread" and "norm" as (sum, count).

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (100, 20))
        >>> kernel = init_representer(jax.random.key(1), x, outputs=1, dim=4, points=50)
        >>> gradient, metrics = jax.grad(distillation_loss, has_aux=True)(kernel, x, jnp.tanh(x[:, :1]), spread=0.01)
        >>> gradient.points.shape, sorted(metrics)
        ((50, 4), ['norm', 'spread', 'squared_error'])
    """
    collisions = kernel.collisions(x @ kernel.projection)
    error = jnp.square(collisions @ kernel.alpha + kernel.bias - targets)
    # The root has no gradient at zero, where the kernel of far representers may underflow.
    bound = jnp.square(jnp.sqrt(collisions + 1e-9) @ jnp.abs(kernel.alpha))
    size = jnp.sum(kernel.alpha * (kernel.collisions(kernel.points) @ kernel.alpha), 0)
    loss = error.mean() + spread * bound.mean() + norm * size.mean()
    terms = {"squared_error": error, "spread": bound, "norm": size}
    return loss, {name: (term.sum(), jnp.asarray(term.size)) for name, term in terms.items()}
