"""The two small language models that methods are judged on, each with windows to calibrate and others to judge on."""

import dataclasses
from pathlib import Path

import numpy as np

from effjax.data import python_docs
from effjax.evaluate import windows_from_text
from effjax.models.embedded import load_default
from effjax.models.hf import LoadedModel, load_model

STORIES, STORIES_TEXT = "models/stories260K/hf", "text/tinystories_sample/tinystories_sample.txt"
CHARACTERS, JUDGED, LENGTH = 900_000, 200, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model and its text.

    Attributes:
        name: of the model.
        model: in float32.
        pool: int32 [windows, 256] that calibration sets are drawn from.
        evaluation: int32 [windows, 256] of other text.
    """

    name: str
    model: LoadedModel
    pool: np.ndarray
    evaluation: np.ndarray

    def calibration(self, seed: int, windows: int) -> np.ndarray:
        """A set drawn by seed, in the order of the text."""
        return self.pool[np.sort(np.random.default_rng(seed).choice(len(self.pool), windows, replace=False))]


def stories(data: Path) -> Task:
    """stories260K: judged on the last 200 windows of the text, calibrated on windows before them."""
    model = load_model(data / STORIES)
    text = (data / STORIES_TEXT).read_text(encoding="utf-8")[:CHARACTERS]
    windows = windows_from_text(model.tokenizer, text, length=LENGTH, bos=model.config.bos_token_id)
    return Task(name="stories260K", model=model, pool=windows[:-JUDGED], evaluation=windows[-JUDGED:])


def embedded(judged: int = 64) -> Task:
    """The model in the package: its training documents to calibrate on, its held-out ones to judge on."""
    model = load_default(dtype="float32")
    pool, evaluation = (documentation(model, split) for split in ("train", "heldout"))
    spread = np.linspace(0, len(evaluation) - 1, min(judged, len(evaluation))).round().astype(int)
    return Task(name="embedded", model=model, pool=pool, evaluation=evaluation[spread])


def documentation(
    model: LoadedModel, split: str, *, length: int = LENGTH, max_windows: int | None = None
) -> np.ndarray:
    """The embedded model's documents of a split ("train" or "heldout"), int32 `[windows, length]`."""
    config = model.config
    ends = (*config.eos_token_ids[:1], *([] if config.bos_token_id is None else [config.bos_token_id]))
    return windows_from_text(
        model.tokenizer,
        python_docs.documents(split),
        length=length,
        bos=config.bos_token_id,
        separator=ends,
        max_windows=max_windows,
    )


def missing(data: Path) -> str | None:
    """What `data` lacks for `stories`, or None."""
    return next((name for name in (STORIES, STORIES_TEXT) if not (data / name).exists()), None)
