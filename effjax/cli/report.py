"""`effjax report`: the report for models compressed before."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from effjax.cli.compress import show, write_report
from effjax.cli.console import progress, say
from effjax.cli.inputs import Judging, OptionalModel, Switch, new_directory, open_model, open_original
from effjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Judges compressed models against their original and writes report.html and report.json.

    The page is one file with its plots inside; the JSON holds the same data.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY ...")]
    """Directories that `effjax compress` wrote, all from one original."""
    original: OptionalModel = None
    """What they were made from, where their recipes do not say."""
    out: Path = Path("effjax-report")
    """Directory to write; it must not exist."""
    overwrite: Switch = False
    """Replaces --out if effjax wrote it before."""
    prompt: str = "Return a"
    """Start of the text samples."""
    judging: Judging = dataclasses.field(default_factory=Judging)

    def run(self) -> int:
        from effjax.compress import Sampling, judge
        from effjax.io.directory import renamed_when_whole

        if not self.models:
            raise ConfigError("report needs at least one directory that effjax compress wrote")
        new_directory(self.out, overwrite=self.overwrite)
        opened = [open_model(str(path)) for path in self.models]
        names = [model.name for model in opened]
        for model in opened:
            if model.recipe is None:
                raise ConfigError(f"{model.name} is not compressed: report compares compressed models with --original")
            if names.count(model.name) > 1 or model.name == "dense":
                raise ConfigError(f"two models would be called {model.name!r} in the report: rename a directory")
        original = open_original(opened[0], self.original).model
        windows = self.judging.cut(original)
        with progress() as report:
            found = judge(
                original,
                {"dense": original.params, **{model.name: model.model.params for model in opened}},
                {model.name: model.recipe for model in opened},
                windows,
                text=self.judging.described(),
                rule=self.judging.rule(),
                sampling=Sampling(prompt=self.prompt, seed=self.judging.seed),
                batch_size=self.judging.batch_size,
                seed=self.judging.seed,
                progress=report,
            )
        with renamed_when_whole(self.out, overwrite=self.overwrite) as directory:
            write_report(directory, found)
        show(found)
        say(f"\nwritten: {self.out / 'report.html'}")
        return 0
