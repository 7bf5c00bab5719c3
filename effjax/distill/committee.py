"""A committee of frozen teachers that need not resemble each other, and the module by which a student asks them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.distill.mlp import init_mlp
from effjax.errors import ConfigError
from effjax.lift import lift

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A trained model cut at a middle layer; nothing of it is trained.

    Attributes:
        params: of the model; leaves may be compressed.
        apply_lo: `(params, x) -> u`, from the teacher's own input to the middle, `[batch, split_dim]`.
        apply_hi: `(params, u) -> (v, logits)`, from the middle to the input of the last layer, `[batch, out_dim]`, and
            to the logits `[batch, labels]`.
        split_dim: width of the middle.
        out_dim: width before the last layer.
        shares_labels: whether its logits are over the student's labels; else only its features teach.
    """

    params: PyTree
    apply_lo: Callable[[PyTree, Any], Any] = dataclasses.field(metadata={"static": True})
    apply_hi: Callable[[PyTree, Any], Any] = dataclasses.field(metadata={"static": True})
    split_dim: int = dataclasses.field(metadata={"static": True})
    out_dim: int = dataclasses.field(metadata={"static": True})
    shares_labels: bool = dataclasses.field(default=True, metadata={"static": True})

    def answer(self, middle: Float[Array, "batch split_dim"]) -> tuple[jax.Array, jax.Array]:
        """What the frozen upper half makes of a middle state: features and logits. Gradients flow to `middle`."""
        return lift(self.apply_hi)(jax.lax.stop_gradient(self.params), middle)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What a teacher made of examples, in its own modality: it does not change, and can be kept for all epochs.

    Attributes:
        middle: `float[batch, split_dim]`.
        logits: `float[batch, labels]`.
    """

    middle: Float[Array, "batch split_dim"]
    logits: Float[Array, "batch labels"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Committee:
    """Foundation and complementary teachers together.

    Attributes:
        teachers: at least one.
        embed_dim: width of the learned vector that tells a question whom it is for.
    """

    teachers: tuple[Teacher, ...]
    embed_dim: int = dataclasses.field(default=16, metadata={"static": True})

    def observe(self, inputs: tuple[Any, ...]) -> tuple[Seen, ...]:
        """Each teacher on its own view of the same examples.

        Args:
            inputs: what `apply_lo` of each takes, in the order of the teachers.

        Raises:
            ConfigError: other than an input a teacher.
        """
        if len(inputs) != len(self.teachers):
            raise ConfigError(f"{len(inputs)} inputs for {len(self.teachers)} teachers: give each its own, in order")
        found = []
        for teacher, x in zip(self.teachers, inputs, strict=True):
            middle = lift(teacher.apply_lo)(teacher.params, x)
            found.append(Seen(middle=middle, logits=teacher.answer(middle)[1]))
        return tuple(found)


def diverse_init(
    key: jax.Array, student: PyTree, committee: Committee, *, d1: int, d2: int, hidden: int | None = None
) -> dict[str, PyTree]:
    """The parameters to train: the student's, and a module of questions, answers and importances beside them.

    Args:
        key: of the module; the student stays as given.
        student: its parameters.
        committee: the teachers.
        d1: width of the student's early state, which it asks from.
        d2: width of its late state, which answers are compared with.
        hidden: width of the module's hidden layers; None for `4 * d1`.

    Returns:
        "student" and "module": of every teacher a question net `[d1 + embed_dim -> split_dim]`, an answer net
        `[out_dim -> d2]` and its vector, and one importance net `[d1 -> teachers]`.

    Raises:
        ConfigError: no teacher.

    Example:
        >>> from effjax.distill.mlp import halves, init_mlp
        >>> lo, hi = halves(1)
        >>> big = init_mlp(jax.random.key(0), (8, 32, 16, 3))
        >>> teacher = Teacher(params=big, apply_lo=lo, apply_hi=hi, split_dim=32, out_dim=16)
        >>> small = init_mlp(jax.random.key(1), (4, 6, 5, 3))
        >>> params = diverse_init(jax.random.key(2), small, Committee(teachers=(teacher,)), d1=6, d2=5)
        >>> sorted(params["module"]), strip(params) is small
        (['importance', 'teacher_0'], True)
    """
    if not committee.teachers:
        raise ConfigError("diverse_init: the committee has no teacher: give at least one")
    width, module = 4 * d1 if hidden is None else hidden, {}
    for i, teacher in enumerate(committee.teachers):
        of_question, of_answer, of_vector = jax.random.split(jax.random.fold_in(key, i), 3)
        module[f"teacher_{i}"] = {
            "question": init_mlp(of_question, (d1 + committee.embed_dim, width, teacher.split_dim)),
            "answer": init_mlp(of_answer, (teacher.out_dim, width, d2)),
            "vector": jax.random.normal(of_vector, (committee.embed_dim,)),
        }
    # Zeros at its end: training begins with all teachers equally important.
    importance = init_mlp(jax.random.fold_in(key, len(committee.teachers)), (d1, width, len(committee.teachers)))
    importance["layer_1"] = jax.tree.map(jnp.zeros_like, importance["layer_1"])
    return {"student": student, "module": module | {"importance": importance}}


def strip(params: dict[str, PyTree]) -> PyTree:
    """The student alone: what is served, exactly as it was trained."""
    return params["student"]
