"""What the experiments with committees share: training a teacher, and a student that asks (`effjax.distill`)."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.distill import Batch, Committee, Diverse, diverse_init, diverse_loss, strip
from effjax.errors import ConfigError
from train.config import LoopConfig
from train.loop import fit
from train.processes import to_host
from train.step import TrainState, make_optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskConfig(LoopConfig):
    """The loss, the teachers and the loop.

    Attributes:
        out: folder for the runs of the teachers and the student, and the finished `model/`.
        resume: go on from the newest checkpoints in `out`.
        teacher_steps: of either teacher, at `teacher_rate`.
        teacher_rate: their learning rate.
        module_rate: learning rate of the module over that of the student.
        weight, logits, ground, ask, entropy, temperature: see `effjax.distill.Diverse`; the best of the claim's.
        skip_after: step after which teachers of low importance are left out, example by example; 0 for never.
        batch: examples a step.
    """

    out: Path
    resume: bool = False
    teacher_steps: int = 1500
    teacher_rate: float = 2e-3
    module_rate: float = 0.1
    weight: float = 1.0
    logits: float = 1.0
    ground: float = 0.5
    ask: float = 0.5
    entropy: float = 0.05
    temperature: float = 4.0
    skip_after: int = 500
    batch: int = 64
    steps: int = 1500
    learning_rate: float = 2e-2
    warmup: int = 0
    weight_decay: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_steps < 1 or self.batch < 2:
            raise ConfigError(f"teacher_steps={self.teacher_steps}, batch={self.batch}: must be at least 1 and 2")
        _ = self.terms

    @property
    def terms(self) -> Diverse:
        """The weights of the loss."""
        names = [field.name for field in dataclasses.fields(Diverse) if field.name != "threshold"]
        return Diverse(**{name: getattr(self, name) for name in names})


def train_teacher(
    config: AskConfig,
    name: str,
    init: Callable[[jax.Array], Any],
    apply: Callable[[Any, Any], jax.Array],
    batch_at: Callable[[int], Any],
) -> Any:
    """Parameters of a trained teacher, from its own folder in `config.out`; None where it was interrupted.

    Args:
        config: of the experiment.
        name: of the folder.
        init: `key -> params`.
        apply: `(params, x) -> logits`.
        batch_at: `step -> (x, labels)`.
    """
    loop = config.of_part(steps=config.teacher_steps, learning_rate=config.teacher_rate, stop_at=0, warmup=0)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, batch[0]), batch[1])
        return losses.sum(), jnp.asarray(losses.size, jnp.float32)

    state = fit(loss_fn, init, batch_at, loop, config.out / name, resume=config.resume)
    if int(state.step) < config.teacher_steps:
        print(f"stopped while the {name} teacher was trained; go on with --resume")
        return None
    return to_host(state.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """A network that can ask.

    Attributes:
        init: `key -> params`.
        apply: `(params, x) -> (early, late, logits)`.
        d1, d2: widths of its early and its late state.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, Any], tuple[jax.Array, jax.Array, jax.Array]]
    d1: int
    d2: int


def train_student(
    config: AskConfig,
    committee: Committee,
    student: Student,
    batch_at: Callable[[int], Any],
    shown: Any,
    judge: Callable[[Any], Mapping[str, float]],
    *,
    observe: Callable[[Committee, Any], Batch] = lambda committee, batch: batch,
) -> tuple[Any, dict[str, float]] | None:
    """Trains the student and the module that asks.

    Args:
        config: of the experiment.
        committee: the teachers.
        student: the network.
        batch_at: `step -> batch` on the host.
        shown: examples, as a batch, on which the share of passes through teachers is judged.
        judge: held-out figures of the student's parameters.
        observe: what teachers make of a batch, where it was not kept.

    Returns:
        The student on the host and its figures, the share of passes that are kept ("kept") among them; None where the
        run was stopped.
    """

    def init(key: jax.Array) -> Any:
        of_student, of_module = jax.random.split(key)
        start = student.init(of_student)
        return diverse_init(of_module, start, committee, d1=student.d1, d2=student.d2, hidden=64)

    def loss_fn(params: Any, batch: Any, key: jax.Array, committee: Committee) -> tuple[jax.Array, jax.Array]:
        del key
        batch, skip = batch
        batch = observe(committee, batch)
        value, _ = diverse_loss(params, student.apply, committee, batch, config.terms, skip=skip.all())
        return value * len(batch.y), jnp.asarray(len(batch.y), jnp.float32)

    @jax.jit
    def kept_share(params: Any, committee: Committee) -> jax.Array:
        batch = observe(committee, shown)
        return diverse_loss(params, student.apply, committee, batch, config.terms, skip=True)[1].kept_share

    def evaluate(params: Any, committee: Committee) -> dict[str, float]:
        kept = kept_share(params, committee) if config.skip_after else 1.0
        return {**judge(strip(params)), "kept": float(kept)}

    slower = optax.masked(optax.scale(config.module_rate), {"student": False, "module": True})
    state: TrainState = fit(
        loss_fn,
        init,
        lambda step: (batch_at(step), np.full(config.batch, 0 < config.skip_after <= step)),
        config,
        config.out,
        resume=config.resume,
        evaluate=evaluate,
        frozen=committee,
        optimizer=optax.chain(make_optimizer(config), slower),
    )
    if int(state.step) < config.steps:
        print(f"stopped at step {int(state.step)} of {config.steps}; go on with --resume")
        return None
    return strip(to_host(state.params)), evaluate(state.params, committee)
