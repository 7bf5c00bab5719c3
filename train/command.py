"""What the commands of `train/` share: reading the command line, one line for an error, one for the figures."""

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import tyro

from effjax.errors import ConfigError, EffjaxError
from train.processes import is_main, join


def run(
    config: type, train: Callable[[Any], Mapping[str, float] | None], *, prog: str, description: str | None
) -> None:
    """Trains as the command line says; an error that effjax raised on purpose is one line and exit code 1.

    Joins the other processes where the environment names some (`train.processes.join`).

    Args:
        config: the dataclass that holds the options, `out` among them.
        train: gives the figures to print, or None where the run was interrupted.
        prog: as the command is called.
        description: for `--help`.
    """
    try:
        options = tyro.cli(config, prog=prog, description=description)
        join()
        figures = train(options)
    except EffjaxError as error:
        sys.exit(f"error: {error}")
    if figures is not None and is_main():
        print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        print(f"wrote {options.out / 'model'}")


def same_settings(config: Any, passing: Collection[str], **named: str) -> None:
    """Refuses to go on with other settings than the run was begun with; notes them in `config.out` where it begins.

    Args:
        config: the dataclass of options, `out` and `resume` among them.
        passing: options that may change on the way.
        named: what is noted in place of a path, which may be another one on another machine.

    Raises:
        ConfigError: an option that differs.
    """
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in passing} | named
    values = json.loads(json.dumps(values))  # as a file gives them back: lists for tuples
    file = config.out / "settings.json"
    if config.resume and file.exists():
        begun = json.loads(file.read_text(encoding="utf-8"))
        for name, value in values.items():
            if begun.get(name) != value:
                raise ConfigError(
                    f"{config.out} was begun with {name}={begun.get(name)!r}, not {value!r}: go on with the same"
                )
        return
    if is_main() and not (config.out / "checkpoints").exists():
        config.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
