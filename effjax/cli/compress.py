"""`effjax compress`: the main job."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from effjax.cli.console import VERDICT_STYLES, out, progress, say, table
from effjax.cli.inputs import (
    Calibrating,
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

    With --method or --rules: writes one compressed model (safetensors, config, recipe, card) to --out, unit by unit:
    never above --memory, and after a kill the same command goes on where it was.

    Without: tries 8, 4, 3 and 2 bits, 2:4 pruning and low rank side by side, judges each against the original, prints
    the table and writes all of them with report.html and report.json to --out.
    """

    model: ModelName = "default"
    """Directory, hub id, or "default" for the embedded model."""
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
    out: Path = Path("effjax-compressed")
    """Directory to write; it must not exist."""
    overwrite: Switch = False
    """Replaces --out if effjax wrote it before."""
    target_size: OptionalText = None
    """Chooses the width of every matrix so that the model takes at most this: 1.5MiB, or 40% of the original."""
    memory: OptionalText = None
    """Most memory that the whole process may take, such as 2GiB; the result is the same with any."""
    restart: Switch = False
    """Starts over instead of going on with what an earlier run left unfinished."""
    shard_size: str = "4GiB"
    """Weights above this size are written to several files."""
    evaluate: Switch = False
    """Judges a single compressed model too (the side-by-side job always does)."""
    prompt: OptionalText = None
    """Start of the text samples; "Return a" or, with --text, the first words of that text by default."""
    judging: Judging = dataclasses.field(default_factory=Judging)
    calibrating: Calibrating = dataclasses.field(default_factory=Calibrating)

    def run(self) -> int:
        from effjax.stream.work import only_naming_left

        if not only_naming_left(self.out):
            new_directory(self.out, overwrite=self.overwrite)
        recipe = make_recipe(self.method, self.rules, method_fields(self), None)
        if self.target_size is not None:
            recipe = self._within_target(recipe, self.target_size)
        return self._side_by_side() if recipe is None else self._one(recipe)

    def _within_target(self, recipe: Any, target: str) -> Any:
        """A rule a matrix, chosen by what its widths cost; the dense model is in memory for that."""
        from effjax.report_html.page import size
        from effjax.target import recipe_for_target

        if self.method is None or "bits" in method_fields(self):
            raise ConfigError("--target-size chooses the bits of one --method, such as rtn or gptq: leave --bits out")
        if self.memory is not None:
            raise ConfigError(
                "--target-size holds the dense model in memory: leave --memory out, or compress by --rules"
            )
        opened = open_model(self.model)
        windows = self.calibrating.cut(opened.model)
        with progress() as report:
            report("costs of all widths", 0, 1)
            chosen = recipe_for_target(opened.model, recipe.rules[0][1], target, windows, seed=recipe.seed)
            report("costs of all widths", 1, 1)
        say(f"{chosen}\n{size(chosen.nbytes)} of at most {size(chosen.limit)}")
        return chosen.recipe

    def _side_by_side(self) -> int:
        from effjax.compress import default_recipes, survey

        if self.memory is not None or self.restart:
            raise ConfigError("--memory and --restart need --method or --rules: side by side all models are in memory")
        opened = open_model(self.model)
        recipes = {
            n: dataclasses.replace(r, model=opened.name) for n, r in default_recipes(opened.model.params).items()
        }
        windows = self.judging.cut(opened.model)
        with progress() as report:
            found = survey(opened.model, recipes, windows, progress=report, **self._judging())
        self._write_all(found)
        show(found)
        say(f"\nwritten: {self.out / 'report.html'}")
        return 0

    def _judging(self) -> dict[str, Any]:
        """How `survey` and `judge` judge."""
        from effjax.compress import Sampling

        prompt = self.prompt if self.prompt is not None else _first_words(self.judging.text)
        return {
            "text": self.judging.described(),
            "rule": self.judging.rule(),
            "sampling": Sampling(prompt=prompt, seed=self.judging.seed),
            "batch_size": self.judging.batch_size,
            "seed": self.judging.seed,
        }

    def _one(self, recipe: Any) -> int:
        from effjax.compress import judge, unjudged
        from effjax.io.checkpoint import load_checkpoint
        from effjax.model_card import card
        from effjax.models.hf import LoadedModel, load_model
        from effjax.report_html.page import size
        from effjax.stream import Job, compress_checkpoint, open_source, parse_bytes
        from effjax.stream.memory import peak_resident, return_large_blocks_at_once
        from effjax.stream.work import work_directory

        memory = None if self.memory is None else parse_bytes(self.memory)
        if memory is not None:
            if self.evaluate:
                raise ConfigError("--evaluate holds both models in memory: run effjax eval on the result of --memory")
            return_large_blocks_at_once()
        source = open_source(self.model)
        recipe = dataclasses.replace(recipe, model=source.name)
        shell = LoadedModel(config=source.config, params=None, tokenizer=source.tokenizer, source=source.name)
        windows = self.judging.cut(shell) if self.evaluate else None
        needs = any(getattr(method, "needs", None) for _, method in recipe.rules)
        calibration = self.calibrating.cut(shell) if needs else None
        job = Job(source=source, recipe=recipe, calibration=calibration, shard_bytes=parse_bytes(self.shard_size))
        found: list[Any] = []
        with progress() as report:

            def finish(streamed: Any, directory: Path) -> dict[str, str]:
                if windows is None:
                    found.append(unjudged(shell, source.structs, streamed, recipe, self.out.name))
                else:
                    original = dataclasses.replace(load_model(source.directory), source=source.name)
                    trees = {"dense": original.params, self.out.name: load_checkpoint(directory).params}
                    recipes = {self.out.name: recipe}
                    found.append(judge(original, trees, recipes, windows, progress=report, **self._judging()))
                return {"README.md": card(found[0], found[0].variants[1])}

            try:
                streamed = compress_checkpoint(
                    job,
                    self.out,
                    memory=memory,
                    overwrite=self.overwrite,
                    restart=self.restart,
                    finish=finish,
                    progress=report,
                )
            except KeyboardInterrupt:
                kept = work_directory(self.out).exists()
                raise KeyboardInterrupt(
                    "interrupted; what is finished is kept: give the same command again to go on, or add --restart to "
                    "start over"
                    if kept
                    else ""
                ) from None
        if not found:  # only the renaming was left
            found.append(unjudged(shell, source.structs, streamed, recipe, self.out.name))
        show(found[0])
        if streamed.resumed:
            say(f"\nwent on after {streamed.resumed} of {streamed.units} units that an earlier run had finished")
        if memory is not None:
            say(f"\npeak memory {size(peak_resident())} of {size(memory)}")
        say(f"\nwritten: {self.out}")
        return 0

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
    if not judged:
        columns += ["median error", "largest error"]
        rows = [[*row, *_errors(v.leaves)] for row, v in zip(rows, found.variants, strict=True)]
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


def _errors(leaves: Any) -> list[str]:
    """The median of the relative errors of the compressed tensors, and the largest with its tensor."""
    errors = sorted((error, leaf.path) for leaf in leaves for error in leaf.errors)
    return [f"{errors[len(errors) // 2][0]:.4f}", f"{errors[-1][0]:.4f} ({errors[-1][1]})"] if errors else ["", ""]


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
