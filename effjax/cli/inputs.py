"""What several commands take: a model, and the text to judge it on."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import tyro

from effjax.errors import CalibrationError, CheckpointError, ConfigError

ModelName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")]
OptionalModel = Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Fields = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE ...", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model with the name a recipe records, and the recipe it was made by when it is compressed."""

    model: Any
    name: str
    recipe: Any = None


def open_model(name: str) -> Opened:
    """Loads a directory, dense or compressed, a hub id, or the embedded model ("default")."""
    from effjax.io.checkpoint import is_checkpoint, load_checkpoint
    from effjax.models.config import DecoderConfig
    from effjax.models.embedded import load_default
    from effjax.models.hf import LoadedModel, load_model
    from effjax.recipe import Recipe

    if name == "default" and not os.path.isdir(name):
        return Opened(model=dataclasses.replace(load_default(), source="default"), name="default")
    if not is_checkpoint(name):
        model = load_model(name)
        return Opened(model=model, name=model.source)
    loaded = load_checkpoint(name)
    tokenizer = None
    if loaded.tokenizer_json is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
    config = DecoderConfig.from_hf(loaded.config)
    source = Path(name).resolve().name
    model = LoadedModel(config=config, params=loaded.params, tokenizer=tokenizer, source=source)
    return Opened(model=model, name=source, recipe=Recipe.from_dict(loaded.recipe) if loaded.recipe else None)


def open_original(compressed: Opened, original: str | None) -> Opened:
    """The model that `compressed` was made from: as told, or as its recipe records it."""
    recorded = None if compressed.recipe is None else compressed.recipe.model
    if original is None and (recorded == "default" or (recorded or "").count("/") == 1):
        original = recorded
    if original is None:
        made_from = f" (it was made from {recorded!r})" if recorded else ""
        raise ConfigError(f"{compressed.name}: name the model it was made from with --original{made_from}")
    found = open_model(original)
    if found.recipe is not None:
        raise ConfigError(f"--original {original} is compressed itself: name the dense model")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging:
    """How models are judged."""

    text: OptionalFile = None
    """UTF-8 text to judge on; the held-out part of the Python documentation by default."""
    windows: int = 64
    """How many windows to take from the text, at equal distances."""
    window_length: OptionalInt = None
    """Tokens in a window; 256 by default, or as many as the model was made for."""
    batch_size: int = 8
    """Windows that run at once; more is faster and takes more memory."""
    margin: float = 0.02
    """Loss in nats per token that still counts as indistinguishable; up to 5 times as much is called slight."""
    seed: int = 0
    """Of the bootstrap and of the text samples."""

    def rule(self) -> Any:
        from effjax.evaluate import VerdictRule

        return VerdictRule(margin=self.margin, slight=5 * self.margin, broken=max(1.0, 5 * self.margin))

    def described(self) -> str:
        return "held-out Python documentation" if self.text is None else self.text.name

    def cut(self, model: Any) -> np.ndarray:
        """Evaluation windows for `model`."""
        from effjax.evaluate import windows_from_text

        config, options = model.config, _text_options(model)
        length = min(256, config.max_position_embeddings) if self.window_length is None else self.window_length
        if length > config.max_position_embeddings:
            raise ConfigError(
                f"--window-length {length} is more than the {config.max_position_embeddings} positions of "
                f"{model.source}: choose at most {config.max_position_embeddings}"
            )
        windows = windows_from_text(
            model.tokenizer, self._documents(), length=length, max_windows=self.windows, **options
        )
        if len(windows) < 2:
            raise CalibrationError(
                f"an interval needs at least 2 windows, got {len(windows)}: give more text or --windows"
            )
        _check_tokens(windows, model)
        return windows

    def _documents(self) -> str | list[str]:
        from effjax.data import python_docs

        return python_docs.documents("heldout") if self.text is None else _read_text(self.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrating:
    """Texts that methods with statistics are calibrated on."""

    calibration: OptionalFile = None
    """UTF-8 text; the training part of the Python documentation by default."""
    calibration_windows: int = 128
    """How many windows to take from the text, at random."""
    calibration_length: OptionalInt = None
    """Tokens in a window; 2048 by default, or as many as the model was made for."""
    calibration_seed: int = 0
    """Of the choice of windows."""

    longest: ClassVar[int] = 2048

    def length(self, model: Any) -> int:
        """Tokens in a window for `model`."""
        positions = model.config.max_position_embeddings
        length = min(self.longest, positions) if self.calibration_length is None else self.calibration_length
        if not 2 <= length <= positions:
            raise ConfigError(
                f"--calibration-length {length}: {model.source} has {positions} positions, choose from 2 to {positions}"
            )
        if self.calibration_windows < 1:
            raise ConfigError(f"--calibration-windows {self.calibration_windows}: at least one")
        return length

    def cut(self, model: Any) -> np.ndarray:
        """Calibration windows for `model`, `int32[windows, length]`."""
        from effjax.evaluate import windows_from_text

        options = {**_text_options(model), "length": self.length(model)}
        rng = np.random.default_rng(self.calibration_seed)
        if self.calibration is not None:
            found = windows_from_text(model.tokenizer, _read_text(self.calibration), **options)
            found = found[np.sort(rng.permutation(len(found))[: self.calibration_windows])]
        else:
            found = self._from_documents(model, rng, options)
        _check_tokens(found, model)
        return found

    def _from_documents(self, model: Any, rng: np.random.Generator, options: dict[str, Any]) -> np.ndarray:
        """Documents in random order, of which no more are tokenised than it takes."""
        from effjax.data import python_docs
        from effjax.evaluate import windows_from_text

        documents = python_docs.documents("train")
        order = rng.permutation(len(documents))
        ends = np.cumsum([len(documents[i]) for i in order])
        letters = 4 * self.calibration_windows * options["length"]
        while True:
            count = int(np.searchsorted(ends, letters)) + 1
            found = windows_from_text(
                model.tokenizer,
                [documents[i] for i in order[:count]],
                max_windows=self.calibration_windows,
                keep="first",
                **options,
            )
            if len(found) == self.calibration_windows or count >= len(documents):
                return found
            letters *= 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratingKV(Calibrating):
    """Texts that the codes of a cache are learned from; keys, values and their gradients are all held at once."""

    calibration_windows: int = 64
    """How many windows to take from the text, at random."""
    calibration_length: OptionalInt = None
    """Tokens in a window; 256 by default, or as many as the model was made for."""

    longest: ClassVar[int] = 256


def _text_options(model: Any) -> dict[str, Any]:
    """How texts become windows of `model`."""
    config = model.config
    if model.tokenizer is None:
        raise ConfigError(f"{model.source}: has no tokenizer.json, so no text can be read; put one into the directory")
    ends = [*config.eos_token_ids[:1], *([] if config.bos_token_id is None else [config.bos_token_id])]
    return {"bos": config.bos_token_id, "separator": ends}


def _check_tokens(windows: np.ndarray, model: Any) -> None:
    if windows.max() >= model.config.vocab_size:
        raise ConfigError(
            f"{model.source}: the tokenizer makes token {windows.max()}, but vocab_size is {model.config.vocab_size}: "
            "take the tokenizer.json that belongs to the model"
        )


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise CalibrationError(f"{file} is empty: give a text of at least two windows")
    return text


def make_recipe(method: str | None, rules: Path | None, flags: dict[str, Any], name: str | None) -> Any:
    """The recipe that the arguments ask for, or None when they ask for none."""
    from effjax.recipe import Recipe, parse_method

    if rules is not None:
        if method is not None or flags:
            extra = ", ".join(["--method"] * (method is not None) + [f"--{key.replace('_', '-')}" for key in flags])
            raise ConfigError(f"--rules and {extra} exclude each other: write them into {rules}")
        return dataclasses.replace(Recipe.from_file(rules), model=name)
    if method is None:
        if flags:
            raise ConfigError(f"--{next(iter(flags)).replace('_', '-')} needs --method, such as --method rtn")
        return None
    return Recipe(rules=((None, parse_method(method, **flags)),), model=name)


def new_directory(directory: Path, *, overwrite: bool) -> None:
    """Refuses, before any work, an output directory that exists or cannot be made.

    Raises:
        CheckpointError: it exists and `overwrite` is not given, or it is none that effjax wrote, or there is no parent.
    """
    if directory.exists() or directory.is_symlink():
        ours = directory.is_dir() and any((directory / name).is_file() for name in ("effjax.json", "report.json"))
        empty = directory.is_dir() and not any(directory.iterdir())
        if not overwrite:
            raise CheckpointError(f"{directory} exists already: choose another --out, or add --overwrite to replace it")
        if not (ours or empty):
            raise CheckpointError(f"{directory} was not written by effjax, so it is not replaced: choose another --out")
    elif not directory.absolute().parent.is_dir():
        raise CheckpointError(
            f"{directory}: the directory {directory.absolute().parent.name} does not exist: make it first"
        )


def to_json(values: Any) -> str:
    """JSON text; what is not finite must have been replaced before."""
    return json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
