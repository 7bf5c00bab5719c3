"""Distils a decoder from another one on a text: the teacher runs beside the student, or once before, into a store.

The teacher may be compressed. The student is a smaller decoder with random weights, or `--student`, a model that was
pruned or quantized and shall come back to the teacher: zeros of its weights stay zeros, codes stay codes.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from effjax.cli.inputs import Opened, open_model
from effjax.distill import StoreConfig, TeacherStore, kl_divergence, top_k_divergence, write_store
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.hf import LoadedModel
from effjax.paths import leaves_with_paths
from train.command import same_settings
from train.config import LoopConfig
from train.finetune import PASSING, computing, in_batches, read_windows
from train.loop import fit
from train.processes import is_main, to_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmDistillConfig(LoopConfig):
    """The teacher, the student, the text and the loop.

    Attributes:
        experiment: "lm".
        teacher: directory, hub id, or "default" for the embedded model; dense or compressed.
        text: UTF-8 text; its end is held out.
        out: folder for `checkpoints/`, `metrics.jsonl` and the finished `model/`.
        student: a model with the teacher's labels to begin with; None for a new one, of the sizes below.
        resume: go on from the newest checkpoint in `out`.
        layers: blocks of a new student; as all sizes, None takes the teacher's.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        heads: query heads.
        kv_heads: key and value heads.
        weight: of the teacher, from 0 (text alone) to 1 (teacher alone).
        temperature: of both distributions.
        store: directory of the teacher's outputs: written first where it is not whole, then read in place of the
            teacher, who runs only to judge.
        top_k: labels that a store keeps at each position.
        batch: windows a step.
        context: tokens a window predicts.
        heldout: share of the windows, at the end of the text, that is judged on.
    """

    text: Path
    out: Path
    experiment: Literal["lm"] = "lm"
    teacher: str = "default"
    student: str | None = None
    resume: bool = False
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    weight: float = 0.9
    temperature: float = 2.0
    store: Path | None = None
    top_k: int = 64
    batch: int = 16
    context: int = 128
    heldout: float = 0.1
    steps: int = 1000
    warmup: int = 50

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout={self.heldout}: must be between 0 and 1")
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight={self.weight}: must be from 0 to 1")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature}: must be positive")
        sizes = [name for name in ("layers", "hidden", "intermediate", "heads", "kv_heads") if getattr(self, name)]
        if self.student is not None and sizes:
            raise ConfigError(f"--student has its own sizes: leave out {sizes[0]}={getattr(self, sizes[0])}")


def open_student(config: LmDistillConfig, teacher: Opened) -> Opened:
    """The model to begin with: a copy that was compressed, or a new one.

    Raises:
        ConfigError: other labels or another tokenizer than the teacher's, or sizes that do not fit.
    """
    if config.student is not None:
        found = open_model(config.student)
        ours, its = (None if o.model.tokenizer is None else o.model.tokenizer.to_str() for o in (teacher, found))
        if found.model.config.vocab_size != teacher.model.config.vocab_size or (its is not None and its != ours):
            raise ConfigError(
                f"--student {config.student}: has {found.model.config.vocab_size} labels of a tokenizer that is not "
                f"the one of the teacher ({teacher.model.config.vocab_size}): distil from a teacher with the same"
            )
        return found
    shape: DecoderConfig = teacher.model.config
    hidden, heads = config.hidden or shape.hidden_size, config.heads or shape.num_attention_heads
    if hidden % heads:
        raise ConfigError(f"hidden={hidden} does not divide into heads={heads}: choose others")
    shape = dataclasses.replace(
        shape,
        hidden_size=hidden,
        num_hidden_layers=config.layers or shape.num_hidden_layers,
        intermediate_size=config.intermediate or shape.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=config.kv_heads or config.heads or shape.num_key_value_heads,
        head_dim=hidden // heads,
    )
    params = jax.jit(Decoder(shape).init)(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    model = LoadedModel(config=shape, params=params, tokenizer=teacher.model.tokenizer, source="student")
    return Opened(model=model, name="student")


def zeros_of(params: Any) -> dict[str, np.ndarray]:
    """Where dense kernels are exactly zero, as pruning left them, by path."""
    kernels = {p: x for p, x in leaves_with_paths(params) if p.endswith("kernel") and not ej.arrays.is_compressed(x)}
    zeros = {path: np.asarray(x) == 0 for path, x in kernels.items()}
    return {path: where for path, where in zeros.items() if where.any()}


def with_zeros(params: Any, zeros: dict[str, Any]) -> Any:
    """The same with zeros there, which then have no gradient."""
    leaves, structure = jax.tree.flatten(params, is_leaf=ej.arrays.is_compressed)
    paths = [path for path, _ in leaves_with_paths(params)]
    pairs = zip(paths, leaves, strict=True)
    return jax.tree.unflatten(structure, [jnp.where(zeros[p], 0, x) if p in zeros else x for p, x in pairs])


def teacher_store(config: LmDistillConfig, teacher: Opened, apply: Any, windows: np.ndarray) -> TeacherStore:
    """The store that `config` names, after what is missing was written."""
    assert config.store is not None
    kept = StoreConfig(k=min(config.top_k, teacher.model.config.vocab_size), temperature=config.temperature)
    logits = jax.jit(lambda params, tokens: apply({"params": params}, tokens))
    params = computing(teacher.model.params, config.compute_dtype)

    def progress(done: int, total: int) -> None:
        print(f"teacher {done}/{total} windows", flush=True)

    inputs, options = windows[:, :-1], {"teacher": f"{teacher.name} {config.compute_dtype}", "batch": config.batch}
    return write_store(config.store, lambda x: logits(params, x), inputs, kept, progress=progress, **options)


def distill(config: LmDistillConfig) -> dict[str, float] | None:
    """Trains the student and writes `config.out / "model"`.

    Returns:
        Held-out loss of the teacher and of the student, and their divergence, in nats a token; or None when the run was
        stopped before its last step.
    """
    teacher = open_model(config.teacher)
    student = open_student(config, teacher)
    windows, heldout = read_windows(student if student.model.tokenizer is not None else teacher, config)
    named = {"text": config.text.name, "teacher": Path(config.teacher).name, "store": str(config.store is not None)}
    same_settings(config, PASSING, **named, student=Path(config.student).name if config.student else "")
    ask, answer = (ej.lift(Decoder(opened.model.config).apply) for opened in (teacher, student))
    stored, codes = ej.partition(student.model.params)
    trained, fixed = ej.partition(computing(student.model.params, config.compute_dtype))
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    taught = computing(teacher.model.params, config.compute_dtype)
    zeros = zeros_of(student.model.params)
    store = teacher_store(config, teacher, ask, windows) if config.store is not None else None
    frozen = {"student": fixed, "zeros": zeros} | ({"teacher": taught} if store is None else {})

    def logits_of(trained: Any, frozen: Any, inputs: jax.Array) -> jax.Array:
        params = with_zeros(ej.combine(trained, frozen["student"]), frozen["zeros"])
        return answer({"params": params}, inputs).astype(jnp.float32)

    def loss_fn(trained: Any, batch: Any, key: jax.Array, frozen: Any) -> tuple[jax.Array, jax.Array]:
        del key
        windows, outputs = batch
        logits = logits_of(trained, frozen, windows[:, :-1])
        text = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        if store is None:
            said = ask({"params": frozen["teacher"]}, windows[:, :-1])
            told = kl_divergence(said, logits, temperature=config.temperature)
        else:
            told = top_k_divergence(outputs, logits)
        values = (1 - config.weight) * text + config.weight * told
        return values.sum(), jnp.asarray(values.size, jnp.float32)

    def batch_at(step: int) -> Any:
        ids = np.random.default_rng((config.seed, step)).integers(0, len(windows), config.batch)
        return windows[ids], None if store is None else store.rows(ids)

    @jax.jit
    def judged(trained: Any, frozen: Any, taught: Any, windows: jax.Array, valid: jax.Array) -> jax.Array:
        logits = logits_of(trained, frozen, windows[:, :-1])
        said = ask({"params": taught}, windows[:, :-1]).astype(jnp.float32)
        losses = [optax.softmax_cross_entropy_with_integer_labels(z, windows[:, 1:]) for z in (said, logits)]
        return jnp.stack([(x.mean(1) * valid).sum() for x in (*losses, kl_divergence(said, logits))])

    def evaluate(trained: Any, frozen: Any) -> dict[str, float]:
        sums = [np.asarray(judged(trained, frozen, taught, w, v)) for w, v in in_batches(heldout, config.batch)]
        values = np.stack(sums).sum(0, dtype=np.float64) / len(heldout)
        return dict(zip(("teacher_loss", "heldout_loss", "divergence"), map(float, values), strict=True))

    before = evaluate(trained, frozen)
    count, whole = (sum(math.prod(x.shape) for x in _leaves(o.model.params)) for o in (student, teacher))
    print(
        f"{count:,} weights learn from {whole:,}; held-out loss {before['heldout_loss']:.4f} before, teacher's", end=" "
    )
    print(f"{before['teacher_loss']:.4f}", flush=True)
    options = {"resume": config.resume, "evaluate": evaluate, "frozen": frozen, "unit": "tokens"}
    state = fit(loss_fn, trained, batch_at, config, config.out, **options)
    if int(state.step) < config.steps:
        print(f"stopped at step {int(state.step)} of {config.steps}; go on with --resume")
        return None
    found = to_host(state.params)
    leaves = [x.astype(s.dtype) for x, s in zip(*map(jax.tree.leaves, (found, stored)), strict=True)]
    tuned = with_zeros(ej.combine(jax.tree.unflatten(jax.tree.structure(stored), leaves), codes), zeros)
    after = evaluate(ej.partition(computing(tuned, config.compute_dtype))[0], frozen)
    tokenizer = (student if student.model.tokenizer is not None else teacher).model.tokenizer
    if is_main():
        save_checkpoint(
            config.out / "model",
            tuned,
            config=student.model.config.to_hf(),
            recipe=None if student.recipe is None else student.recipe.to_dict(),
            tokenizer_json=tokenizer.to_str(),
            card=_card(config, teacher, before, after, count),
            overwrite=True,
        )
    return after | {"perplexity": math.exp(after["heldout_loss"])}


def _card(config: LmDistillConfig, teacher: Opened, before: Any, after: Any, weights: int) -> str:
    how = "a store of its outputs" if config.store is not None else "its outputs"
    return (
        f"# A student of {teacher.name}, on {config.text.name}\n\n{weights:,} weights, {config.steps} steps of "
        f"{config.batch} windows of {config.context} tokens from {how}, weight {config.weight:g}, temperature "
        f"{config.temperature:g}.\nHeld-out loss {before['heldout_loss']:.4f} nats a token before, "
        f"{after['heldout_loss']:.4f} after, the teacher's {after['teacher_loss']:.4f}; divergence from the teacher "
        f"{before['divergence']:.4f} before, {after['divergence']:.4f} after.\n"
    )


def _leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=ej.arrays.is_compressed)
