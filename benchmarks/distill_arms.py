"""Ways to teach a small student, side by side: by logits, by hints, and by asking a committee (DiverseDistill)."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar
from effjax.distill import (
    Batch,
    Committee,
    Diverse,
    diverse_init,
    diverse_loss,
    hint_loss,
    init_projection,
    kl_divergence,
)

MODULE_RATE = 2e-3  # of what is thrown away; that of the student is tuned
HIDDEN = 64  # of questions and answers


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train the student.

    Attributes:
        kind: "alone", "logits" (divergence, the mean over teachers), "hints" (features and logits), "asked"
            (DiverseDistill).
        teachers: who teaches: 0 is the foundation teacher, 1 the complementary one.
        skip: leave out teachers of low importance after the warm-up, a third of the steps.
    """

    kind: str
    teachers: tuple[int, ...] = ()
    skip: bool = False

    def members(self, committee: Committee) -> Committee:
        """Those of the committee who teach."""
        return dataclasses.replace(committee, teachers=tuple(committee.teachers[i] for i in self.teachers))


ARMS = {
    "alone": Arm("alone"),
    "logits of the foundation": Arm("logits", (0,)),
    "logits of the complementary": Arm("logits", (1,)),
    "logits of both": Arm("logits", (0, 1)),
    "hints of the foundation": Arm("hints", (0,)),
    "hints of the complementary": Arm("hints", (1,)),
    "hints of both": Arm("hints", (0, 1)),
    "asked foundation": Arm("asked", (0,)),
    "asked committee": Arm("asked", (0, 1)),
    "asked committee, skipping": Arm("asked", (0, 1), skip=True),
}
# By kind of arm, what is tried of each hyper-parameter.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "alone": {"clip": (1.0, 1e3)},
    "logits": {"weight": (0.3, 1.0, 3.0), "temperature": (1.0, 2.0, 4.0), "clip": (1.0, 1e3)},
    "hints": {"weight": (0.3, 1.0, 3.0), "temperature": (1.0, 2.0, 4.0)},
    "asked": {"weight": (0.3, 1.0, 3.0), "logits": (1.0, 4.0), "temperature": (1.0, 2.0, 4.0)},
}


def train(
    loss: Callable[[Any, Any, jax.Array], Any],
    params: dict[str, Any],
    draw: Callable[[jax.Array], Any],
    key: jax.Array,
    rate: Any,
    steps: int,
    clip: Any = 1.0,
) -> Any:
    """AdamW on `params["student"]` at `rate`, on the rest at a rate of its own; both fall by a cosine.

    Args:
        loss: `(params, batch, share of the steps done) -> (value, what to note)`.
        params: by part.
        draw: a batch from a key.
        key: of the batches.
        rate: may be traced.
        steps: how many.
        clip: largest norm of a gradient, may be traced.

    Returns:
        The last parameters, and the notes of every step.
    """

    def adamw(rate: Any) -> optax.GradientTransformation:
        return optax.flatten(optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-4))

    parts = {name: adamw(rate if name == "student" else MODULE_RATE) for name in params}
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.partition(parts, {name: name for name in params}))

    def step(carry: Any, t: jax.Array) -> Any:
        params, state = carry
        batch = draw(jax.random.fold_in(key, t))
        gradient, notes = jax.grad(loss, has_aux=True)(params, batch, t / steps)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), notes

    (params, _), notes = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    return params, notes


def plain_loss(apply: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any, jax.Array], Any]:
    """Cross entropy of `apply(params["student"], x)`, for a teacher that is itself in training."""

    def loss(params: Any, batch: Any, share: jax.Array) -> Any:
        del share
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(apply(params["student"], x), y).mean(), ()

    return loss


def with_module(arm: Arm, key: jax.Array, student: Any, committee: Committee, d1: int, d2: int) -> dict[str, Any]:
    """The student, and what is trained beside it and thrown away."""
    if arm.kind == "asked":
        return diverse_init(key, student, committee, d1=d1, d2=d2, hidden=HIDDEN)
    if arm.kind == "hints":
        keys = jax.random.split(key, len(committee.teachers))
        pairs = zip(keys, committee.teachers, strict=True)
        return {"student": student, "module": [init_projection(k, d2, teacher.out_dim) for k, teacher in pairs]}
    return {"student": student}


def loss_of(arm: Arm, told: Mapping[str, Any], student_apply: Any, committee: Committee) -> Callable[..., Any]:
    """The loss of an arm for `train`; what it notes is the share of passes through teachers."""

    def loss(params: Any, batch: Batch, share: jax.Array) -> Any:
        if arm.kind == "asked":
            skip = (share >= 1 / 3) & arm.skip
            value, terms = diverse_loss(params, student_apply, committee, batch, Diverse(**told), skip=skip)
            return value, terms.kept_share
        _, late, logits = student_apply(params["student"], batch.x)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()
        for i, (teacher, seen) in enumerate(zip(committee.teachers, batch.seen, strict=True)):
            said = kl_divergence(seen.logits, logits, temperature=told["temperature"])
            if arm.kind == "hints":
                said += hint_loss(teacher.answer(seen.middle)[0], late, params["module"][i])
            value += told["weight"] * said.mean() / len(committee.teachers)
        return value, jnp.ones(())

    return loss


Measure = Callable[[Arm, dict[str, float]], tuple[np.ndarray, float]]  # scores of all seeds in %, share of passes
Chosen = dict[str, dict[str, float]]


def tune(arms: Sequence[str], rate: float, measure: Measure) -> None:
    """Prints all settings of every arm, and the best."""
    for name in arms:
        grid = {"rate": (rate,)} | GRIDS[ARMS[name].kind]
        best, chosen = -1.0, {}
        for values in itertools.product(*grid.values()):
            options = dict(zip(grid, values, strict=True))
            score = mean(measure(ARMS[name], options)[0])
            print(f"  {score:.2f} {options}", flush=True)
            if score > best:
                best, chosen = score, options
        print(f"{name!r}: {chosen},  # {best:.2f}", flush=True)


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def judge(
    name: str, complementary: np.ndarray, chosen: Chosen, measure: Measure, *, margin: float = 1
) -> tuple[dict[str, Bar], Any]:
    """Runs all arms with what was chosen for them, prints a table, and returns bars and mean scores.

    Args:
        name: of the setting.
        complementary: scores of the complementary teacher, of all seeds.
        chosen: hyper-parameters by arm.
        measure: scores and share of passes.
        margin: points by which the committee shall be ahead of the mean of its teachers' logits.
    """
    settings = {arm: chosen[arm.removesuffix(", skipping")] for arm in ARMS}
    found, kept = {}, {}
    for arm in ARMS:
        found[arm], kept[arm] = measure(ARMS[arm], settings[arm])
    alone, asked = found["alone"], found["asked committee"]
    room = (complementary - alone).mean()
    table = Table(title=f"{name}: the student's score in %, {len(alone)} seeds")
    for column in ("", "mean", "s.e.", "committee over it", "s.e.", "gap closed", "passes", "chosen"):
        table.add_column(column)
    for arm, values in found.items():
        over = asked - values
        figures = (values.mean(), error(values), over.mean(), error(over), (values - alone).mean() / room, kept[arm])
        table.add_row(arm, *(f"{x:.2f}" for x in figures), " ".join(f"{k} {v:g}" for k, v in settings[arm].items()))
    Console(width=150).print(table)
    single = max((n for n in found if n.startswith(("logits of the", "hints of the"))), key=lambda n: found[n].mean())
    both, foundation, skipping = (found[n] for n in ("logits of both", "asked foundation", "asked committee, skipping"))
    bars = {
        "committee over logits of both": Bar(mean(asked - both), low=margin),
        f"committee over the best single teacher ({single})": Bar(mean(asked - found[single]), low=0),
        "committee over asking the foundation alone": Bar(mean(asked - foundation), low=0),
        "passes left by skipping": Bar(kept["asked committee, skipping"], high=0.7, paper="about 0.7"),
        "skipping over asking all": Bar(mean(skipping - asked), low=-0.5, paper="no loss"),
    }
    return {f"{name}: {bar}": bars[bar] for bar in bars}, {arm: mean(values) for arm, values in found.items()}
