"""Fine-tunes a model on a text: the tables of a sketch, an adapter, or all of it.

    python -m train.finetune --method spallm --bits 2 --text notes.txt --out runs/notes

The result, `runs/notes/model`, is the tuned model in the compressed form it was tuned in, which `effjax eval` and
`effjax generate` read. With `--resume` an interrupted run goes on where it was.
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
from effjax.errors import ConfigError
from effjax.evaluate import windows_from_text
from effjax.io.checkpoint import save_checkpoint
from effjax.models.decoder import Decoder
from effjax.recipe import Recipe, apply_recipe, parse_method
from effjax.sketch import partition_tables, scale_by_spread
from effjax.sparsity.relu import relufy
from train.command import run, same_settings
from train.config import LoopConfig
from train.loop import fit
from train.processes import is_main, to_host
from train.step import make_optimizer

RATES = {"spallm": 2e-2, "lora": 5e-3, "qlora": 5e-3, "full": 5e-4}
# What may change on the way.
PASSING = ("out", "resume", "mesh", "log_every", "eval_every", "save_every", "keep", "tensorboard", "stop_at")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """The model, the text and the loop.

    Attributes:
        method: "spallm" trains the tables of a sketch alone; "qlora" low-rank factors beside NF4, or beside `bits` bits
            rounded to nearest; "lora" those beside 8 bits, which is nearly the model itself; "full" every weight.
        model: directory, hub id, or "default" for the embedded model. One that is sketched or quantized already is
            tuned as it is.
        text: UTF-8 text; its end is held out.
        out: folder for `checkpoints/`, `metrics.jsonl` and the finished `model/`.
        resume: go on from the newest checkpoint in `out`.
        bits: of the sketch or of QLoRA's base.
        group_size: inputs that share a scale in QLoRA's base.
        groups: tables an output of a sketch; twice as many train twice as many values.
        rank: of LoRA's factors.
        relu_stage: 1 or 2 exchanges the model's activations for ReLUs first (`effjax.sparsity.relu.relufy`); 0 leaves
            them.
        relu_shift: what the gates of such a model let through exceeds it.
        batch: windows a step.
        context: tokens a window predicts.
        heldout: share of the windows, at the end of the text, that is judged on.
        calibration: windows of the text that a sketch is calibrated on.
        learning_rate: peak; for "spallm" the share of an output's spread that a step moves its tables by. None takes
            one that did well for the method; the best depends on the model too: try several.
    """

    text: Path
    out: Path
    method: Literal["spallm", "lora", "qlora", "full"] = "spallm"
    model: str = "default"
    resume: bool = False
    bits: int = 4
    group_size: int = 64
    groups: int = 1
    rank: int = 8
    relu_stage: Literal[0, 1, 2] = 0
    relu_shift: float = 0.0
    batch: int = 8
    context: int = 128
    heldout: float = 0.1
    calibration: int = 64
    steps: int = 250
    learning_rate: float | None = None  # type: ignore[override]  # filled in below
    warmup: int = 10
    weight_decay: float = 0.0
    eval_every: int = 50

    def __post_init__(self):
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", RATES[self.method])
        super().__post_init__()
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout={self.heldout}: must be between 0 and 1")
        for name in ("batch", "context", "calibration", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.relu_shift and not self.relu_stage:
            raise ConfigError(f"relu_shift={self.relu_shift}: needs relu_stage=1 or 2, which puts ReLUs there")
        _ = self.compression

    @property
    def compression(self) -> Any:
        """The method that the model is compressed by before it is tuned, or None."""
        if self.method == "spallm":
            return parse_method("spallm", bits=self.bits, groups=self.groups)
        if self.method == "lora":
            return parse_method("rtn", bits=8, group_size=None)
        if self.method == "qlora" and self.bits == 4:
            return parse_method("nf4", block_size=self.group_size)
        if self.method == "qlora":
            return parse_method("rtn", bits=self.bits, group_size=self.group_size, clip="mse")
        return None


def read_windows(opened: Opened, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on and held out, `int32 [windows, context + 1]`.

    Args:
        opened: the model.
        config: has `text`, `context` and `heldout`.

    Raises:
        ConfigError: no tokenizer, no such file, not UTF-8, or too short a text.
    """
    model = opened.model
    if model.tokenizer is None:
        raise ConfigError(f"{opened.name}: has no tokenizer.json, so no text can be read; put one into the directory")
    if config.context >= model.config.max_position_embeddings:
        raise ConfigError(
            f"context={config.context}: {opened.name} has {model.config.max_position_embeddings} positions"
        )
    try:
        text = config.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {config.text}: cannot be read as UTF-8 text ({error})") from None
    windows = windows_from_text(model.tokenizer, text, length=config.context + 1, bos=model.config.bos_token_id)
    judged = math.ceil(config.heldout * len(windows))
    if judged >= len(windows):
        raise ConfigError(
            f"--text {config.text}: {len(windows)} windows of {config.context} tokens; choose a shorter context"
        )
    return windows[:-judged], windows[-judged:]


def in_batches(windows: np.ndarray, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows in batches of one size, `[batch, length]`, and which of each count: the last is filled up with others."""
    rows = np.pad(windows, ((0, -len(windows) % batch), (0, 0)), mode="wrap")
    valid = np.arange(len(rows)) < len(windows)
    return [(rows[i : i + batch], valid[i : i + batch]) for i in range(0, len(rows), batch)]


def relufied(opened: Opened, config: FinetuneConfig) -> Opened:
    """The model with the activations that it is tuned with."""
    if not config.relu_stage:
        return opened
    changed = relufy(opened.model.config, stage=config.relu_stage, shift=config.relu_shift)
    return dataclasses.replace(opened, model=dataclasses.replace(opened.model, config=changed))


def compressed(opened: Opened, config: FinetuneConfig, windows: np.ndarray) -> tuple[Any, Recipe | None]:
    """The parameters as they are tuned, before the first step, and how they were made."""
    params, method, recipe = opened.model.params, config.compression, opened.recipe
    if method is not None and recipe is None and not any(map(ej.arrays.is_compressed, _leaves(params))):
        recipe = Recipe(rules=((None, method),), seed=config.seed, model=opened.name)
        stats = None
        if method.needs:
            some = windows[np.linspace(0, len(windows) - 1, min(config.calibration, len(windows))).astype(int), :-1]
            batches = ({"params": params}, [some[i : i + 1] for i in range(len(some))])
            stats = ej.calibrate(Decoder(opened.model.config).apply, *batches, needs=method.needs)
        params = apply_recipe(params, recipe, stats=stats)
    if config.method in ("lora", "qlora"):
        params = ej.add_lora(params, config.rank, key=jax.random.key(config.seed))
    return params, recipe


def split(params: Any, method: str) -> tuple[Any, Any]:
    """What is trained, and what is not.

    Raises:
        ConfigError: "full" for a compressed model.
        LeafError: no tables or no adapters.
    """
    if method == "full":
        if any(map(ej.arrays.is_compressed, _leaves(params))):
            raise ConfigError("--method full trains dense weights, and this model is compressed: name the dense model")
        return ej.partition(params)
    return partition_tables(params) if method == "spallm" else ej.partition_adapters(params)


def computing(params: Any, dtype: Any) -> Any:
    """The same tree computing in `dtype`: floating arrays, and what compressed leaves materialize to."""

    def cast(x: Any) -> Any:
        if ej.arrays.is_compressed(x):
            return x.astype(dtype)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, params, is_leaf=ej.arrays.is_compressed)


def finetune(config: FinetuneConfig) -> dict[str, float] | None:
    """Tunes the model and writes `config.out / "model"`.

    Returns:
        Held-out loss before and after, in nats a token, or None when the run was stopped before its last step.
    """
    opened = relufied(open_model(config.model), config)
    train, heldout = read_windows(opened, config)
    same_settings(config, PASSING, text=config.text.name, model=Path(config.model).name)
    params, recipe = compressed(opened, config, train)
    stored, kept = split(params, config.method)
    trained, frozen = split(computing(params, config.compute_dtype), config.method)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)  # also where the file holds 16 bits
    apply = ej.lift(Decoder(opened.model.config).apply)

    def losses(trained: Any, frozen: Any, windows: jax.Array) -> jax.Array:
        logits = apply({"params": ej.combine(trained, frozen)}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), windows[:, 1:])

    def loss_fn(trained: Any, windows: jax.Array, key: jax.Array, frozen: Any) -> tuple[jax.Array, jax.Array]:
        del key
        values = losses(trained, frozen, windows)
        return values.sum(), jnp.asarray(values.size, jnp.float32)

    def batch_at(step: int) -> np.ndarray:
        return train[np.random.default_rng((config.seed, step)).integers(0, len(train), config.batch)]

    total = jax.jit(lambda trained, frozen, w, valid: (losses(trained, frozen, w).mean(1) * valid).sum())

    def evaluate(trained: Any, frozen: Any) -> dict[str, float]:
        sums = [float(total(trained, frozen, w, valid)) for w, valid in in_batches(heldout, config.batch)]
        return {"heldout_loss": math.fsum(sums) / len(heldout)}

    before = evaluate(trained, frozen)["heldout_loss"]
    count = sum(x.size for x in jax.tree.leaves(trained))
    whole = sum(math.prod(x.shape) for x in _leaves(params))
    print(f"{count:,} values of {whole:,} train ({count / whole:.2%}); held-out loss {before:.4f} before")
    optimizer = make_optimizer(config)
    if config.method == "spallm":  # outputs differ in size, and Adam's steps do not
        optimizer = optax.chain(optimizer, scale_by_spread())
    options = {
        "resume": config.resume,
        "evaluate": evaluate,
        "frozen": frozen,
        "optimizer": optimizer,
        "unit": "tokens",
    }
    state = fit(loss_fn, trained, batch_at, config, config.out, **options)
    if int(state.step) < config.steps:
        print(f"stopped at step {int(state.step)} of {config.steps}; go on with --resume")
        return None
    found = to_host(state.params)
    leaves = [x.astype(s.dtype) for x, s in zip(*map(jax.tree.leaves, (found, stored)), strict=True)]
    tuned = ej.combine(jax.tree.unflatten(jax.tree.structure(stored), leaves), kept)
    after = evaluate(split(computing(tuned, config.compute_dtype), config.method)[0], frozen)["heldout_loss"]
    tokenizer = opened.model.tokenizer.to_str()
    files = {"card": _card(config, opened, before, after, count), "tokenizer_json": tokenizer}
    described = None if recipe is None else recipe.to_dict()
    if is_main():
        save_checkpoint(
            config.out / "model", tuned, config=opened.model.config.to_hf(), recipe=described, overwrite=True, **files
        )
    return {"before": before, "heldout_loss": after, "perplexity": math.exp(after)}


def _card(config: FinetuneConfig, opened: Opened, before: float, after: float, trained: int) -> str:
    how = "" if config.compression is None else f", compressed by `{config.compression}`"
    return (
        f"# {opened.name}, tuned on {config.text.name}\n\n`{config.method}`{how}: {trained:,} values trained for "
        f"{config.steps} steps of {config.batch} windows of {config.context} tokens.\nHeld-out loss {before:.4f} nats "
        f"a token before, {after:.4f} after.\n"
    )


def _leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=ej.arrays.is_compressed)


def main() -> None:
    run(FinetuneConfig, finetune, prog="python -m train.finetune", description=__doc__)


if __name__ == "__main__":
    main()
