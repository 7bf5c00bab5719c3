"""SAM-CLIP: one backbone learns what a second model knows, and rehearses on a few examples what it knew itself.

Wang et al., SAM-CLIP: Merging Vision Foundation Models towards Semantic and Spatial Understanding (2023). A head for
the second model is put on the encoder of the first, trained alone (probing), then all is trained together: the cosine
distance to the second model's embeddings, and focal and dice loss to the first model's own masks on replayed images.
The functions of losses, gradient and rates take any pair of models.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from effjax.errors import ConfigError
from effjax.models.promptable import apply_promptable
from effjax.models.transformer import apply_blocks, dense, init_dense, init_norm, layer_norm, unit
from effjax.models.vit import Pooling, ViT, apply_vit, pool

Params = dict[str, Any]
Loss = Callable[[Any, Any], jax.Array]  # (params, batch) -> mean loss, float32


def cosine_loss(teacher: Float[Array, "*batch dim"], student: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """`1 - cos`, from 0 to 2 (L_CLIP of the paper); no gradient flows to the teacher.

    Example:
        >>> x = jnp.array([3.0, 4.0])
        >>> round(float(cosine_loss(x, 2 * x)), 4), round(float(cosine_loss(x, -x)), 4)
        (0.0, 2.0)
    """
    return 1 - jnp.sum(unit(jax.lax.stop_gradient(teacher)) * unit(student), axis=-1)


def focal_dice_loss(
    teacher: Float[Array, "*batch height width"],
    scores: Float[Array, "*batch height width"],
    *,
    gamma: float = 2.0,
    focal_weight: float = 20.0,
) -> Float[Array, "*batch"]:
    """Focal and dice loss of masks, 20 to 1 as in SAM, for soft targets; zero where the probabilities are the targets.

    Focal: cross entropy times `|p - z|**gamma`, which is the usual focal loss where z is 0 or 1 (Li et al., Generalized
    Focal Loss, NeurIPS 2020, equation 3). Dice: with squares in the denominator (Milletari et al., V-Net, 2016), since
    without them the best p for a soft z is not z.

    Args:
        teacher: probabilities, z; no gradient flows to them.
        scores: the student's logits.
        gamma: how much pixels that are right already count less.
        focal_weight: of the focal part.

    Returns:
        float32, a value a mask.

    Example:
        >>> z = jnp.array([[[0.9, 0.2], [0.5, 0.1]]])
        >>> right = jnp.log(z / (1 - z))
        >>> bool(abs(focal_dice_loss(z, right)[0]) < 1e-6), bool(focal_dice_loss(z, right + 0.1)[0] > 1e-4)
        (True, True)
    """
    z, scores = jax.lax.stop_gradient(teacher).astype(jnp.float32), scores.astype(jnp.float32)
    p = jax.nn.sigmoid(scores)
    focal = (jnp.abs(p - z) ** gamma * optax.sigmoid_binary_cross_entropy(scores, z)).mean((-2, -1))
    shared, both = (p * z).sum((-2, -1)), (jnp.square(p) + jnp.square(z)).sum((-2, -1))
    return focal_weight * focal + 1 - (2 * shared + 1) / (both + 1)


def init_text_head(key: jax.Array, encoder: Params, config: ViT, *, dim: int, layers: int = 2) -> Params:
    """A head for the second model's embeddings: copies of the encoder's last block, a norm, a perceptron.

    Args:
        key: of the perceptron.
        encoder: parameters of the encoder that the head is put on.
        config: of the encoder.
        dim: of the embeddings.
        layers: copies of the last block.
    """
    up, down = jax.random.split(key)
    last = encoder[f"block_{config.layers - 1}"]
    return {
        **{f"block_{i}": jax.tree.map(jnp.array, last) for i in range(layers)},
        "norm": init_norm(config.width),
        "up": init_dense(up, config.width, 2 * config.width),
        "out": init_dense(down, 2 * config.width, dim),
    }


def apply_text_head(
    config: ViT, head: Params, grid: Float[Array, "batch rows columns width"], *, pooling: Pooling | None = "max"
) -> jax.Array:
    """Embeddings of length 1 of the images, or of every patch.

    Args:
        config: of the encoder.
        head: from `init_text_head`.
        grid: what the encoder gave.
        pooling: before norm and perceptron, as in the paper; None for the patches' own, `[batch, rows, columns, dim]`.

    Example:
        >>> from effjax.models.vit import init_vit
        >>> config = ViT(size=(8, 8), width=8, layers=1, heads=2)
        >>> encoder = init_vit(jax.random.key(0), config)
        >>> head = init_text_head(jax.random.key(1), encoder, config, dim=5)
        >>> grid = apply_vit(config, encoder, jnp.ones((3, 8, 8, 3)))
        >>> apply_text_head(config, head, grid).shape, apply_text_head(config, head, grid, pooling=None).shape
        ((3, 5), (3, 2, 2, 5))
    """
    x = apply_blocks(head, grid.reshape(len(grid), -1, grid.shape[-1]), config.heads).reshape(grid.shape)
    if pooling is not None:
        x = pool(x, pooling)
    return unit(dense(head["out"], jax.nn.gelu(dense(head["up"], layer_norm(head["norm"], x)))))


def text_segment(
    config: ViT,
    encoder: Params,
    head: Params,
    images: Float[Array, "batch height width channels"],
    texts: Float[Array, "labels dim"],
) -> Float[Array, "batch height width labels"]:
    """Masks from texts alone: the cosine of every patch with every text, brought to the size of the image.

    Args:
        config: of the encoder.
        encoder, head: parameters.
        images: of any size that the patch divides.
        texts: an embedding a label.

    Returns:
        Cosines; the largest tells the label of a pixel.
    """
    patches = apply_text_head(config, head, apply_vit(config, encoder, images), pooling=None)
    cosines = patches @ unit(texts).T
    return jax.image.resize(cosines, (*images.shape[:3], len(texts)), "bilinear")


def in_turn(*losses: tuple[Loss, float]) -> Callable[[Any, Sequence[Any]], tuple[jax.Array, tuple[jax.Array, ...]]]:
    """The weighted sum of losses on batches of their own, whose gradient is made of one backward pass after the other.

    Only one loss's activations are held at a time. The losses are means, and are not weighed by the sizes of batches.

    Args:
        losses: each `(params, batch) -> mean`, with its weight.

    Returns:
        `(params, batches) -> (sum, every mean)`, a batch a loss, for `jax.grad` (of first order, in reverse).

    Example:
        >>> total = in_turn((lambda p, x: (p * x).mean(), 1.0), (lambda p, x: (p**2 * x).mean(), 10.0))
        >>> batches = jnp.ones(4), jnp.full(2, 0.5)
        >>> (value, parts), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(3.0), batches)
        >>> float(value), [float(part) for part in parts], float(gradient)
        (48.0, [3.0, 4.5], 31.0)
    """

    def values(params: Any, batches: Sequence[Any]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        parts = tuple(loss(params, batch) for (loss, _), batch in zip(losses, batches, strict=True))
        return jnp.stack([weight * part for (_, weight), part in zip(losses, parts, strict=True)]).sum(), parts

    @jax.custom_vjp
    def total(params: Any, batches: Sequence[Any]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return values(params, batches)

    def forward(params: Any, batches: Sequence[Any]) -> Any:
        gradient, parts, weights = None, [], [weight for _, weight in losses]
        for (loss, weight), batch in zip(losses, batches, strict=True):
            part, own = jax.value_and_grad(loss)(params, batch)
            own = jax.tree.map(lambda g, w=weight: w * g, own)
            gradient = own if gradient is None else jax.tree.map(jnp.add, gradient, own)
            parts.append(part)
            # The next pass begins when this one's gradient is there.
            params, gradient = jax.lax.optimization_barrier((params, gradient))
        value = jnp.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum()
        return (value, tuple(parts)), gradient

    def backward(gradient: Any, cotangent: Any) -> Any:
        return jax.tree.map(lambda g: (cotangent[0] * g).astype(g.dtype), gradient), None

    total.defvjp(forward, backward)
    return total


def module_rates(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Scales the updates of each module; chained behind an optimizer, it is the learning rate that it scales.

    Args:
        rates: of each top-level name of the parameters; a module of rate 0 stays as it is, bit for bit.

    Raises:
        ConfigError: when parameters come whose modules are not those of `rates`.

    Example:
        >>> optimizer = optax.chain(optax.sgd(1.0), module_rates({"encoder": 0.1, "head": 1.0}))
        >>> params = {"encoder": jnp.ones(1), "head": jnp.ones(1)}
        >>> updates, _ = optimizer.update(params, optimizer.init(params))
        >>> {name: round(float(update[0]), 4) for name, update in updates.items()}
        {'encoder': -0.1, 'head': -1.0}
    """

    def labels(params: Mapping[str, Any]) -> dict[str, str]:
        if set(params) != set(rates):
            raise ConfigError(f"module_rates: of {sorted(rates)}, but the parameters are {sorted(params)}: name these")
        return {name: name for name in params}

    parts: dict[Hashable, optax.GradientTransformation] = {
        name: optax.scale(rate) if rate else optax.set_to_zero() for name, rate in rates.items()
    }
    return optax.partition(parts, labels)


def text_head_loss(
    config: ViT, params: Params, batch: Any, *, probe: bool = False, pooling: Pooling = "max"
) -> jax.Array:
    """Mean cosine distance of "text_head" on "encoder" from the second model.

    Args:
        config: of the encoder.
        params: "encoder" and "text_head".
        batch: images, and the second model's embeddings of them.
        probe: no gradient flows to the encoder.
        pooling: of patches.
    """
    images, embeddings = batch
    grid = apply_vit(config, params["encoder"], images)
    grid = jax.lax.stop_gradient(grid) if probe else grid
    return cosine_loss(embeddings, apply_text_head(config, params["text_head"], grid, pooling=pooling)).mean()


def mask_loss(config: ViT, params: Params, batch: Any) -> jax.Array:
    """Mean focal and dice loss of a promptable segmenter (`effjax.models.promptable`) on clicks.

    Args:
        config: of the encoder.
        params: "encoder", "prompt" and "mask_head"; others have no part in it.
        batch: images, points `[batch, clicks, 2]`, and probabilities `[batch, clicks, height, width]`.
    """
    images, points, masks = batch
    return focal_dice_loss(masks, apply_promptable(config, params, images, points)).mean()
