"""DiverseDistill: a student asks each teacher in that teacher's own terms, and learns whose answers help it.

DiverseDistill (Liu et al., arXiv 2402.14035). Its text gives the parts: questions made for a teacher, answers brought
into the student's space, an importance of every teacher for every example. The formulas here are ours.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.distill.committee import Committee, Seen, Teacher
from effjax.distill.logits import kl_divergence
from effjax.distill.mlp import apply_mlp
from effjax.errors import ConfigError

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diverse:
    """Weights of the terms; numbers, or traced scalars where many settings are tried in one program.

    Attributes:
        weight: of all that the teachers say, beside the task.
        logits: of the divergence from a teacher's logits, for teachers of the same labels.
        ground: of the squared distance of a question from what the teacher itself had in its middle, over the mean
            square of that: without it questions leave the region that the frozen layers understand.
        ask: of the task's loss of the answer: makes a question carry the content of the task.
        entropy: of the importances; above zero, so that no teacher is given up early.
        temperature: of the logits.
        threshold: importance below which a teacher is skipped for an example; None for `1 / (2 K)` of K teachers.
    """

    weight: float = 0.3
    logits: float = 1.0
    ground: float = 0.5
    ask: float = 0.5
    entropy: float = 0.05
    temperature: float = 2.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and (value < 0 or (field.name == "temperature" and value == 0)):
                raise ConfigError(f"{field.name}={value}: must be {'positive' if value == 0 else 'at least 0'}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Examples as the student sees them, and as each teacher saw them.

    Attributes:
        x: the student's input.
        y: `int[batch]`, labels.
        seen: from `Committee.observe`, in the order of the teachers.
    """

    x: Any
    y: Int[Array, "batch"]
    seen: tuple[Seen, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiverseTerms:
    """The parts of the loss, for every example (and teacher).

    Attributes:
        task: `[batch]`, cross entropy of the student.
        match: `[batch, teachers]`, distance of the student from the answers, and divergence from the logits.
        ground: `[batch, teachers]`.
        ask: `[batch, teachers]`.
        importance: `[batch, teachers]`, adds up to 1 an example.
        kept: `bool[batch, teachers]`, who was asked.
    """

    task: Float[Array, "batch"]
    match: Float[Array, "batch teachers"]
    ground: Float[Array, "batch teachers"]
    ask: Float[Array, "batch teachers"]
    importance: Float[Array, "batch teachers"]
    kept: Bool[Array, "batch teachers"]

    @property
    def kept_share(self) -> Float[Array, ""]:
        """Share of (example, teacher) pairs that were asked: the passes through teachers that training costs."""
        return self.kept.mean(dtype=jnp.float32)


def diverse_loss(
    params: dict[str, PyTree],
    student_apply: Callable[[PyTree, Any], tuple[jax.Array, jax.Array, jax.Array]],
    committee: Committee,
    batch: Batch,
    config: Diverse,
    *,
    skip: bool | Bool[Array, ""] = False,
) -> tuple[Float[Array, ""], DiverseTerms]:
    """The loss of student and module; a pure function for `jax.value_and_grad(..., has_aux=True)`.

    Args:
        params: from `diverse_init`.
        student_apply: `(params, x)` -> early state `[batch, d1]`, late state `[batch, d2]`, logits `[batch, labels]`.
        committee: the teachers.
        batch: examples.
        config: weights of the terms.
        skip: leave out, example by example, teachers of low importance; to be turned on after a warm-up, may be traced.

    Returns:
        The mean over the batch, and its terms. Terms of teachers that are left out do not count.

    Example:
        >>> from effjax.distill import Teacher, diverse_init, halves, init_mlp
        >>> lo, hi = halves(1)
        >>> big, small = init_mlp(jax.random.key(0), (8, 32, 16, 3)), init_mlp(jax.random.key(1), (4, 6, 5, 3))
        >>> teacher = Teacher(params=big, apply_lo=lo, apply_hi=hi, split_dim=32, out_dim=16)
        >>> committee = Committee(teachers=(teacher,))
        >>> x = jax.random.normal(jax.random.key(2), (10, 8))
        >>> batch = Batch(x=x[:, ::2], y=jnp.arange(10) % 3, seen=committee.observe((x,)))
        >>> student = lambda params, x: (lo(params, x), *hi(params, lo(params, x)))
        >>> params = diverse_init(jax.random.key(3), small, committee, d1=6, d2=5)
        >>> loss, terms = diverse_loss(params, student, committee, batch, Diverse())
        >>> loss.shape, terms.match.shape, float(terms.kept_share)
        ((), (10, 1), 1.0)
    """
    early, late, logits = student_apply(params["student"], batch.x)
    importance = jax.nn.softmax(apply_mlp(params["module"]["importance"], jax.lax.stop_gradient(early)))
    count = len(committee.teachers)
    threshold = 1 / (2 * count) if config.threshold is None else config.threshold
    kept = (importance >= threshold) | ~jnp.asarray(skip)
    each = [
        _ask(params["module"][f"teacher_{i}"], teacher, seen, early, late, logits, batch.y, config)
        for i, (teacher, seen) in enumerate(zip(committee.teachers, batch.seen, strict=True))
    ]
    match, ground, ask = (jnp.stack(parts, axis=-1) for parts in zip(*each, strict=True))
    task = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
    told = (importance * kept * (match + config.ground * ground + config.ask * ask)).sum(-1)
    entropy = jax.scipy.special.entr(importance).sum(-1)
    loss = (task + config.weight * told - config.entropy * entropy).mean()
    return loss, DiverseTerms(task=task, match=match, ground=ground, ask=ask, importance=importance, kept=kept)


def _ask(
    module: PyTree,
    teacher: Teacher,
    seen: Seen,
    early: jax.Array,
    late: jax.Array,
    logits: jax.Array,
    y: jax.Array,
    config: Diverse,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A question to one teacher and its answer: (match, ground, ask) of every example."""
    seen = jax.lax.stop_gradient(seen)
    vector = jnp.broadcast_to(module["vector"], (len(early), module["vector"].size))
    question = apply_mlp(module["question"], jnp.concatenate([early, vector], axis=-1))
    features, answer = teacher.answer(question)
    match = jnp.square(late - apply_mlp(module["answer"], features)).mean(-1)
    ground = jnp.square(question - seen.middle).mean(-1) / (jnp.square(seen.middle).mean() + 1e-12)
    if not teacher.shares_labels:
        return match, ground, jnp.zeros_like(match)
    match = match + config.logits * kl_divergence(seen.logits, logits, temperature=config.temperature)
    return match, ground, optax.softmax_cross_entropy_with_integer_labels(answer, y)
