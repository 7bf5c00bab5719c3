"""What every run of the loop is told: steps, optimizer, mesh, precision, checkpoints."""

import dataclasses
from typing import Any, Literal

from effjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop needs beside the loss, the parameters and the data.

    Attributes:
        steps: optimizer steps in all, counted from the very first run.
        learning_rate: peak of the schedule: linear warm-up, then a cosine to zero at `steps`.
        warmup: steps of warm-up.
        weight_decay: AdamW's decoupled decay, for kernels alone (not norms, biases or embeddings).
        clip: largest global norm of a gradient.
        seed: of parameters, data order and whatever the loss draws.
        mesh: axis sizes, such as "data=1" or "data=4,fsdp=2,tensor=2".
        accumulate: parts that a batch is computed in, one after another: less memory, the same gradient.
        compute_dtype: what the loss sees the parameters in; those that are kept, and the optimizer, stay float32.
        log_every: steps between two lines of progress; the metrics file has every step.
        eval_every: steps between two held-out evaluations; 0 for only the last.
        save_every: steps between two checkpoints.
        keep: checkpoints kept, the oldest goes first.
        tensorboard: write TensorBoard's event files too; needs the extra `train`.
        stop_at: save and leave after this step, as SIGTERM would make the run do; 0 for never.
    """

    steps: int = 2600
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    mesh: str = "data=1"
    accumulate: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 200
    keep: int = 2
    tensorboard: bool = False
    stop_at: int = 0

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup={self.warmup}: must be at least 0 and below steps={self.steps}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"compute_dtype={self.compute_dtype!r}: must be float32 or bfloat16")

    def of_part(self, **changes: Any) -> "LoopConfig":
        """The loop's settings alone, some of them changed: for one part of a run that has several."""
        kept: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(LoopConfig)}
        return LoopConfig(**kept | changes)
