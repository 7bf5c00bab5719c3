"""`effjax plan`: sizes before anything is loaded."""

import dataclasses
import re
from typing import Any

from effjax.cli.console import out, table
from effjax.cli.inputs import (
    Calibrating,
    Fields,
    ModelName,
    OptionalFile,
    OptionalInt,
    OptionalName,
    OptionalText,
    Switch,
    make_recipe,
    to_json,
)
from effjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Says what compression will give: bytes of every tensor, in all, and peak memory.

    Reads config.json alone, so it works without the weights. Without --method or --rules it lists what
    `effjax compress` would try.
    """

    model: ModelName = "default"
    """Directory with a config.json, hub id, or "default"."""
    method: OptionalName = None
    """rtn, nf4, low_rank, hashed, magnitude, random and others; a wrong name lists all."""
    bits: OptionalInt = None
    """Bits a weight."""
    group_size: OptionalInt = None
    """Inputs that share a scale."""
    set: Fields = ()
    """Further fields of the method, such as symmetric=true or pattern=2:4."""
    rules: OptionalFile = None
    """A recipe file instead of --method."""
    dtype: OptionalName = None
    """Of the original; config.json decides by default."""
    memory: OptionalText = None
    """Says what `effjax compress --memory` would take, such as 2GiB, or refuses as it would."""
    all: Switch = False
    """Lists every tensor instead of one row for all layers."""
    json: Switch = False
    """Prints JSON."""
    calibrating: Calibrating = dataclasses.field(default_factory=Calibrating)

    def run(self) -> int:
        from effjax.cli.compress import method_fields
        from effjax.compress import default_recipes
        from effjax.plan import abstract_params, plan
        from effjax.report_html.page import size

        config, dtype, name = _read(self.model)
        params = abstract_params(config, dtype=self.dtype or dtype or "float32")
        recipe = make_recipe(self.method, self.rules, method_fields(self), name)
        if recipe is None:
            if self.memory is not None:
                raise ConfigError("--memory needs --method or --rules: side by side all models are in memory")
            plans = {"dense": plan(params, None)}
            plans |= {title: plan(params, recipe) for title, recipe in default_recipes(params).items()}
            if self.json:
                print(to_json({title: found.to_dict() for title, found in plans.items()}), end="")
                return 0
            rows = [
                (title, size(p.after), f"{p.after:,}", f"{p.ratio:.2f}x", size(p.peak)) for title, p in plans.items()
            ]
            out().print(table(("variant", "size", "bytes", "ratio", "peak memory"), rows, title=name))
            return 0
        found = plan(params, recipe)
        stream = None if self.memory is None else self._stream(config, params, recipe, name)
        if self.json:
            print(to_json(found.to_dict() | ({} if stream is None else {"stream": stream})), end="")
            return 0
        rows = [
            (path, "x".join(map(str, shape)), kind, count, f"{before:,}", f"{after:,}")
            for (path, shape, kind), (count, before, after) in _grouped(found.rows, self.all).items()
        ]
        console = out()
        console.print(table(("tensor", "shape", "held as", "count", "bytes before", "after"), rows, left=3, title=name))
        console.print(
            f"\n{size(found.before)} -> {size(found.after)} ({found.ratio:.2f} times smaller), "
            f"peak memory {size(found.peak)} and some 0.5 GB for the program itself"
        )
        if stream is not None:
            console.print(
                f"with --memory {self.memory}: {stream['units']} units, peak memory {size(stream['peak'])} of the "
                f"whole process; the least budget is {size(stream['least'])}"
            )
        return 0

    def _stream(self, config: Any, params: Any, recipe: Any, name: str) -> dict[str, int]:
        """Units, peak and least budget of compressing on disk."""
        from effjax.models.hf import LoadedModel
        from effjax.paths import leaves_with_paths
        from effjax.stream import make_schedule, parse_bytes

        shell = LoadedModel(config=config, params=None, tokenizer=None, source=name)
        windows = self.calibrating.calibration_windows, self.calibrating.length(shell)
        memory = parse_bytes(self.memory or "")
        found = make_schedule(config, dict(leaves_with_paths(params)), recipe, windows=windows, memory=memory)
        return {"units": len(found.units), "peak": found.peak, "least": found.least}


def _grouped(rows: Any, every: bool) -> dict[tuple[str, tuple[int, ...], str], tuple[int, int, int]]:
    groups: dict[Any, tuple[int, int, int]] = {}
    for row in rows:
        path = row.path if every else re.sub(r"(^|/)layers_\d+(?=/)", r"\1layers_*", row.path)
        count, before, after = groups.get((path, row.shape, row.kind), (0, 0, 0))
        groups[path, row.shape, row.kind] = count + 1, before + row.before, after + row.after
    return groups


def _read(model: str) -> tuple[Any, str | None, str]:
    """Configuration, dtype of the weights and name, without touching the weights."""
    import importlib.resources
    import json
    import os

    from effjax.models.hf import read_config
    from effjax.plan import config_directory

    if model == "default" and not os.path.isdir(model):
        files = importlib.resources.files("effjax") / "assets" / "default_model"
        with importlib.resources.as_file(files) as directory:
            config, name = read_config(directory), "default"
            entries = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    else:
        directory, name = config_directory(model)
        config = read_config(directory)
        entries = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config, entries.get("torch_dtype") or entries.get("dtype"), name
