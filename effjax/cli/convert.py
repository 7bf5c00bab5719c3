"""`effjax convert`: a model from one file format to another, and whether that is exact."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from effjax.cli.console import out, say, table
from effjax.cli.inputs import OptionalInt, Switch, new_directory, open_model, to_json
from effjax.errors import CheckpointError, ConfigError

FormatName = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "nvfp4", "mxfp4", "bnb-nf4", "gguf", "effjax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Writes a model in another file format, and says for each tensor whether that is exact.

    Exact means that every weight keeps its value. A conversion that is not is refused, with the reason, unless
    --approximate allows it; then the largest error is shown.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory (quantized or dense, or written by effjax), .gguf file, hub id, or "default"."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to write, or a .gguf file; it must not exist."""
    format: FormatName
    """Format to write."""
    approximate: Switch = False
    """Rounds weights that the format cannot hold exactly, instead of refusing."""
    bits: OptionalInt = None
    """Bits of weights that are rounded, where the format leaves a choice; their own by default, or 4."""
    group_size: OptionalInt = None
    """Inputs that share a scale in weights that are rounded; their own by default, or 128."""
    json: Switch = False
    """Prints the verdicts as JSON."""

    def run(self) -> int:
        _new(self.out, self.format)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, schemes = _open(self.model)
        for warning in caught:
            say(f"note: {warning.message}")
        verdicts = self._convert(model, schemes)
        if self.json:
            print(
                to_json({"exact": all(v.exact for v in verdicts), "tensors": [dataclasses.asdict(v) for v in verdicts]})
            )
        else:
            _show(self.model, self.format, verdicts)
        if any(verdict.error is None for verdict in verdicts):
            count = sum(not verdict.exact for verdict in verdicts)
            raise CheckpointError(
                f"{count} of {len(verdicts)} tensors cannot be kept exactly as {self.format}: add --approximate to "
                "round them, or choose another format; nothing was written"
            )
        say(f"written: {self.out}")
        return 0

    def _convert(self, model: Any, schemes: dict[str, Any]) -> list[Any]:
        from effjax.models.quantized_save import plan, write_plan

        if self.format == "effjax":
            return _to_effjax(self.out, model)
        if self.format == "gguf":
            return _to_gguf(self.out, model, self.approximate)
        made = plan(
            model,
            self.format,
            approximate=self.approximate,
            schemes=schemes,
            bits=self.bits,
            group_size=self.group_size,
        )
        if made.exact or self.approximate:
            write_plan(self.out, model, made, format=self.format)
        return list(made.verdicts)


def _new(target: Path, format: str) -> None:
    """Refuses, before any work, what cannot be made."""
    if format == "gguf" and target.suffix != ".gguf":
        raise ConfigError(f"{target}: a GGUF model is one file: give it a name that ends in .gguf")
    if format != "gguf" and target.suffix == ".gguf":
        raise ConfigError(f"{target}: --format {format} writes a directory, not a .gguf file")
    if target.exists():
        raise CheckpointError(f"{target} exists already: choose another name")
    new_directory(target, overwrite=False)


def _open(name: str) -> tuple[Any, dict[str, Any]]:
    """The model, and how its weights are stored where its format says so."""
    from effjax.models.quantized_hf import is_quantized, load_quantized

    directory = Path(name)
    if directory.is_dir() and is_quantized(directory):
        found = load_quantized(directory)
        return found.model, found.schemes
    return open_model(name).model, {}


def _to_effjax(target: Path, model: Any) -> list[Any]:
    from effjax.io.checkpoint import save_checkpoint
    from effjax.models.quantized_save import Verdict, describe
    from effjax.paths import leaves_with_paths

    tokenizer = None if model.tokenizer is None else model.tokenizer.to_str()
    save_checkpoint(target, model.params, config=model.config.to_hf(), tokenizer_json=tokenizer)
    return [
        Verdict(path=path, held=(held := describe(leaf)), stored=held, exact=True, reason="its arrays are kept")
        for path, leaf in leaves_with_paths(model.params)
    ]


def _to_gguf(target: Path, model: Any, approximate: bool) -> list[Any]:
    from effjax.io.formats.gguf_model import write_model
    from effjax.models.quantized_save import Verdict, describe
    from effjax.paths import leaves_with_paths

    tokenizer = None if model.tokenizer is None else model.tokenizer.to_str()
    found = write_model(target, model.config, model.params, tokenizer_json=tokenizer, approximate=approximate)
    leaves = dict(leaves_with_paths(model.params))
    return [
        Verdict(
            path=one.path,
            held=describe(leaves[one.path]) if one.path in leaves else "",
            stored=one.kind,
            exact=one.exact,
            reason=one.reason or "its values are kept",
            error=one.error,
        )
        for one in found
    ]


def _show(name: str, format: str, verdicts: list[Any]) -> None:
    """A row for each kind of tensor and what becomes of it, why some are not exact, and the verdict on the whole."""
    from effjax.models.quantized_save import STAYS_DENSE

    rows: dict[tuple[str, str, str, str], list[Any]] = {}
    reasons: dict[tuple[str, str], None] = {}
    for verdict in verdicts:
        group = re.sub(r"layers_\d+", "layers_*", verdict.path)
        key = (group, verdict.held, verdict.stored, "exact" if verdict.exact else "approximate")
        rows.setdefault(key, []).append(verdict)
        if not verdict.exact or verdict.reason.startswith(STAYS_DENSE):
            reasons[group, verdict.reason] = None
    cells = []
    for (group, held, stored, exact), found in rows.items():
        errors = [one.error for one in found if one.error is not None]
        error = f"{max(errors):.3g}" if errors and exact != "exact" else ""
        cells.append((group, str(len(found)), held, stored, exact, error))
    columns = ("tensor", "count", "held as", "stored as", "verdict", "largest error")
    out().print(table(columns, cells, left=len(columns)))
    for group, reason in reasons:
        print(f"{group}: {reason}")
    inexact = sum(not verdict.exact for verdict in verdicts)
    print(f"{name} -> {format}: {f'approximate ({inexact} of {len(verdicts)} tensors)' if inexact else 'exact'}")
