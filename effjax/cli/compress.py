"""`effjax compress`: the main job."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from effjax.cli.console import VERDICT_STYLES, out, progress, say, table
from effjax.cli.inputs import (
    Fields,
    Judging,
    ModelName,
    OptionalFile,
    OptionalInt,
    OptionalName,
    OptionalText,
    Switch,
    make_recipe,
    new_directory,
    open_model,
    to_json,
)
from effjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress:
    """Compresses a model and shows what it cost.

    With --method or --rules: writes one compressed model (safetensors, config, recipe, card) to --out.

    Without: tries 8, 4, 3 and 2 bits, 2:4 pruning and low rank side by side, judges each against the original, prints
    the table and writes all of them with report.html and report.json to --out.
    """

    model: ModelName = "default"
    """Directory, hub id, or "default" for the embedded model."""
    method: OptionalName = None
    """rtn, nf4, low_rank, hashed, magnitude or random."""
    bits: OptionalInt = None
    """Bits a weight."""
    group_size: OptionalInt = None
    """Inputs that share a scale."""
    set: Fields = ()
    """Further fields of the method, such as symmetric=true or pattern=2:4."""
    rules: OptionalFile = None
    """A recipe file instead of --method."""
    out: Path = Path("effjax-compressed")
    """Directory to write; it must not exist."""
    overwrite: Switch = False
    """Replaces --out if effjax wrote it before."""
    evaluate: Switch = False
    """Judges a single compressed model too (the side-by-side job always does)."""
    prompt: OptionalText = None
    """Start of the text samples; "Return a" or, with --text, the first words of that text by default."""
    judging: Judging = dataclasses.field(default_factory=Judging)

    def run(self) -> int:
        from effjax.compress import Sampling, default_recipes, survey

        new_directory(self.out, overwrite=self.overwrite)
        recipe = make_recipe(self.method, self.rules, method_fields(self), None)
        opened = open_model(self.model)
        model = opened.model
        recipes = default_recipes(model.params) if recipe is None else {self.out.name: recipe}
        recipes = {name: dataclasses.replace(r, model=opened.name) for name, r in recipes.items()}
        judged = recipe is None or self.evaluate
        windows = self.judging.cut(model) if judged else None
        sampling = None
        if judged:
            prompt = self.prompt if self.prompt is not None else _first_words(self.judging.text)
            sampling = Sampling(prompt=prompt, seed=self.judging.seed)
        with progress() as report:
            found = survey(
                model,
                recipes,
                windows,
                text=self.judging.described() if judged else None,
                rule=self.judging.rule(),
                sampling=sampling,
                batch_size=self.judging.batch_size,
                seed=self.judging.seed,
                progress=report,
            )
        (self._write_one if recipe is not None else self._write_all)(found)
        show(found)
        where = self.out if recipe is not None else self.out / "report.html"
        say(f"\nwritten: {where}")
        return 0

    def _write_one(self, found: Any) -> None:
        from effjax.io.checkpoint import save_checkpoint

        save_checkpoint(self.out, found.variants[1].params, overwrite=self.overwrite, **_contents(found, 1))

    def _write_all(self, found: Any) -> None:
        from effjax.io.checkpoint import save_checkpoint
        from effjax.io.directory import renamed_when_whole

        with renamed_when_whole(self.out, overwrite=self.overwrite) as directory:
            for index, variant in enumerate(found.variants[1:], start=1):
                save_checkpoint(directory / slug(variant.name), variant.params, **_contents(found, index))
            write_report(directory, found)


def method_fields(command: Any) -> dict[str, Any]:
    """The fields of a method that a command's flags set."""
    import yaml

    flags = {"bits": command.bits, "group_size": command.group_size}
    fields = {name: value for name, value in flags.items() if value is not None}
    for pair in command.set:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair}: write FIELD=VALUE, such as symmetric=true")
        name = name.replace("-", "_")
        if name in fields:
            raise ConfigError(f"--set {pair}: {name} is given twice")
        fields[name] = text if ":" in text else _scalar(yaml, text)
    return fields


def _scalar(yaml: Any, text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, bool | int | float | str | list) else text


def _contents(found: Any, index: int) -> dict[str, Any]:
    from effjax.model_card import card

    model, variant = found.model, found.variants[index]
    return {
        "config": model.config.to_hf(),
        "recipe": variant.recipe.to_dict(),
        "tokenizer_json": None if model.tokenizer is None else model.tokenizer.to_str(),
        "card": card(found, variant),
    }


def write_report(directory: Path, found: Any) -> None:
    """report.json and report.html of a survey."""
    from effjax.report_html import render

    report = found.to_dict(command=command_line(), environment=environment())
    (directory / "report.json").write_text(to_json(report), encoding="utf-8")
    (directory / "report.html").write_text(render(report), encoding="utf-8")


def show(found: Any) -> None:
    """Prints the comparison, and the samples; on a narrow terminal with fewer digits and without the divergence."""
    from effjax.report_html.page import size

    console = out()
    wide = console.width >= 106
    judged = any(v.comparison for v in found.variants)
    rows = []
    for v in found.variants:
        row = [v.name, size(v.nbytes), f"{v.ratio:.2f}x"]
        if judged:
            row += [f"{v.perplexity:.3f}" if wide else f"{v.perplexity:.5g}", *_judgement(v.comparison, wide)]
        rows.append(row)
    columns = ["model", "size", "ratio"]
    if judged:
        columns += ["perplexity", "ΔNLL", "95% interval", "KL", "same top-1", "verdict"] if wide else []
        columns += [] if wide else ["ppl", "ΔNLL", "95% interval", "top-1", "verdict"]
    console.print()
    console.print(table(columns, rows, gap=2 if wide else 1))
    if judged:
        console.print(f"\n[dim]Verdict: {found.rule}.[/dim]")
    for v in found.variants:
        if v.sample is not None:
            text = " ".join((found.sampling.prompt + v.sample).split())
            console.print(f"\n[bold]{v.name}[/bold]: ", end="")
            console.print(text, markup=False, soft_wrap=False)


def _judgement(comparison: Any, wide: bool) -> list[str]:
    if comparison is None:
        return ["", "", "", "", "original"] if wide else ["", "", "", "original"]
    c, verdict = comparison, f"[{VERDICT_STYLES[comparison.verdict]}]{comparison.verdict}[/]"
    if wide:
        return [f"{c.delta_nll:+.4f}", c.interval, f"{c.kl_mean:.4f}", f"{c.same_top1:.1%}", verdict]
    return [f"{c.delta_nll:+.3f}", f"[{c.delta_low:+.3f},{c.delta_high:+.3f}]", f"{c.same_top1:.0%}", verdict]


def slug(name: str) -> str:
    """A directory name for a variant.

    Example:
        >>> slug("low rank"), slug("2:4")
        ('low-rank', '2-4')
    """
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


def command_line() -> str:
    """The command as it was typed, with file names in place of paths (an output never holds a local path)."""
    if not sys.argv[0].endswith("effjax"):
        return "effjax"
    return shlex.join(["effjax", *(Path(a).name if "/" in a and Path(a).exists() else a for a in sys.argv[1:])])


def environment() -> dict[str, str]:
    """Versions that a number may depend on."""
    import platform
    from importlib import metadata

    import jax

    names = {"python": platform.python_version(), "jax": jax.__version__, "backend": jax.default_backend()}
    try:
        return {"effjax": metadata.version("effjax"), **names}
    except metadata.PackageNotFoundError:  # run from a checkout
        return names


def _first_words(text: Path | None) -> str:
    if text is None:
        return "Return a"
    with text.open(encoding="utf-8", errors="replace") as stream:
        return " ".join(stream.read(2000).split()[:6])
