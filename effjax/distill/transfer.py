"""Task-oriented transfer: a foundation model is adapted to a task, labels a large set, and a small model learns it.

Vemulapalli et al., Knowledge Transfer from Vision Foundation Models for Efficient Training of Small Task-specific
Models (ICML 2024). Three steps: adapt the large model to the few labelled images; train the small one on its outputs
for a transfer set (`effjax.distill.curate`) without labels; finetune it on the labels. Its rival is task-agnostic: the
small model learns the embeddings of the large one as it came, and is finetuned in the same way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from effjax.distill.contrastive import symmetric_contrastive_loss
from effjax.distill.features import Projection, project
from effjax.distill.logits import kl_divergence

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]


def transfer_loss(
    params: PyTree,
    apply: Apply,
    x: Any,
    teacher: Float[Array, "batch *place labels"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "batch"]:
    """The student's divergence from what the adapted teacher said of the images; no labels are used.

    Args:
        params: of the student.
        apply: `(params, x) -> logits`, `[batch, labels]`, or for segmentation `[batch, height, width, labels]`, which
            are resized to the teacher's height and width.
        x: images.
        teacher: its logits, computed once and kept, perhaps in float16.
        temperature: see `kl_divergence`.

    Returns:
        float32, a value an image, in nats; of segmentation the mean over pixels.

    Example:
        >>> apply = lambda params, x: x @ params
        >>> x = jnp.eye(2)
        >>> transfer_loss(jnp.eye(2), apply, x, x + 7.0).tolist()  # equal up to a constant
        [0.0, 0.0]
    """
    logits = apply(params, x)
    if teacher.ndim == 4:
        logits = jax.image.resize(logits, (*teacher.shape[:3], logits.shape[-1]), "bilinear")
    found = kl_divergence(teacher, logits, temperature=temperature)
    return found.reshape(found.shape[0], -1).mean(axis=1)


def agnostic_loss(
    teacher: Float[Array, "batch *place dt"],
    student: Float[Array, "batch *place ds"],
    projection: Projection,
    *,
    temperature: float = 0.07,
) -> Float[Array, "batch"]:
    """Symmetric contrast of the student's projected features with the teacher's of the same images.

    Args:
        teacher: features as it came; no gradient flows to them. `[batch, dt]`, or maps `[batch, height, width, dt]`, of
            which a place is contrasted with the same place of the other images.
        student: its features; maps are resized to the teacher's height and width.
        projection: from `init_projection`.
        temperature: of the cosines.

    Returns:
        float32, a value an image, in nats.

    Raises:
        ValueError: widths that the projection does not bring together.

    Example:
        >>> same = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
        >>> x = jnp.eye(4)
        >>> bool((agnostic_loss(x, x, same) < 1e-4).all()), bool((agnostic_loss(x, x[::-1], same) > 10).all())
        (True, True)
    """
    teacher = jax.lax.stop_gradient(teacher)
    if teacher.ndim == 4:
        student = jax.image.resize(student, (*teacher.shape[:3], student.shape[-1]), "bilinear")
    own = project(projection, student)
    if own.shape != teacher.shape:
        raise ValueError(
            f"agnostic_loss: teacher {list(teacher.shape)} and projected student {list(own.shape)}: make the "
            "projection with init_projection(key, student width, teacher width)"
        )
    places = (x.reshape(len(x), -1, x.shape[-1]) for x in (own, teacher))
    each = jax.vmap(lambda a, b: symmetric_contrastive_loss(a, b, scale=1 / temperature), in_axes=1)
    return each(*places).mean(axis=0)


Labelled = tuple[Any, Int[Array, "rows"]]  # images and their labels


def label_loss(params: PyTree, apply: Apply, labelled: Labelled) -> Float[Array, ""]:
    """Mean cross entropy of `apply(params, images)` with the labels, float32."""
    x, y = labelled
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x).astype(jnp.float32), y).mean()


class KeepBest(NamedTuple):
    """State of `keep_best`.

    Attributes:
        inner: of the optimizer itself.
        params: the best so far.
        loss: of them, float32 scalar.
    """

    inner: Any
    params: PyTree
    loss: Float[Array, ""]

    def or_better(self, params: PyTree, loss: Float[Array, ""]) -> "KeepBest":
        """With these parameters, if their loss is lower."""
        better = loss < self.loss
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, self.params)
        return KeepBest(self.inner, kept, jnp.where(better, loss, self.loss))


def keep_best(
    optimizer: optax.GradientTransformation, judge: Callable[[PyTree], Float[Array, ""]]
) -> optax.GradientTransformation:
    """Early stopping as an optimizer: the updates are those of `optimizer`, its state keeps the best parameters.

    Parameters are judged before each step, those of the start first: if no step makes them better, they remain. So it
    goes where an optimizer goes: through `jit` and `scan`, into checkpoints, over a mesh.

    Args:
        optimizer: any optax transformation.
        judge: `params -> loss` on labels held back; lower is better.

    Example:
        >>> optimizer = keep_best(optax.sgd(1.5), lambda x: jnp.abs(x))  # jumps over the minimum and away
        >>> x = jnp.array(1.0)
        >>> state = optimizer.init(x)
        >>> for gradient in (1.0, -1.0, 1.0):
        ...     updates, state = optimizer.update(jnp.array(gradient), state, x)
        ...     x = x + updates
        >>> float(x), float(state.params), float(state.loss)
        (-0.5, -0.5, 0.5)
    """

    def init(params: PyTree) -> KeepBest:
        return KeepBest(optimizer.init(params), params, jnp.full((), jnp.inf))

    def update(gradient: PyTree, state: KeepBest, params: PyTree = None) -> tuple[PyTree, KeepBest]:
        updates, inner = optimizer.update(gradient, state.inner, params)
        return updates, state.or_better(params, judge(params))._replace(inner=inner)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def adapt(
    params: PyTree,
    apply: Apply,
    train: Labelled,
    heldout: Labelled,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch: int,
    key: jax.Array,
    augment: Callable[[jax.Array, Any], Any] | None = None,
) -> PyTree:
    """Finetunes a model on few labels and stops early: step one (the teacher) and step three (the student).

    Args:
        params: of the model, with a head for the labels.
        apply: `(params, x) -> logits`.
        train: images and labels.
        heldout: labels held back, by which the best parameters on the way are chosen.
        optimizer: for example `optax.adamw`; a mask in it leaves parts of the model as they are.
        steps: how many.
        batch: rows a step, drawn with replacement.
        key: of the draws.
        augment: `(key, x) -> x`, of what is trained on.

    Returns:
        The parameters of the lowest held-out loss, those given among them.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> labelled = x, jnp.array([0, 1])
        >>> apply = lambda params, x: x @ params
        >>> options = {"steps": 20, "batch": 4, "key": jax.random.key(0)}
        >>> found = adapt(jnp.zeros((2, 2)), apply, labelled, labelled, optax.sgd(1.0), **options)
        >>> apply(found, x).argmax(-1).tolist()
        [0, 1]
    """

    def judge(params: PyTree) -> jax.Array:
        return label_loss(params, apply, heldout)

    stopping = keep_best(optimizer, judge)

    def step(carry: Any, t: jax.Array) -> Any:
        params, state = carry
        of_rows, of_images = jax.random.split(jax.random.fold_in(key, t))
        ids = jax.random.randint(of_rows, (batch,), 0, len(train[1]))
        x, y = jax.tree.map(lambda part: jnp.asarray(part)[ids], train)
        x = x if augment is None else augment(of_images, x)
        updates, state = stopping.update(jax.grad(label_loss)(params, apply, (x, y)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, stopping.init(params)), jnp.arange(steps))
    assert isinstance(state, KeepBest)
    return state.or_better(params, judge(params)).params
