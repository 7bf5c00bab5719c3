"""What the commands of `train/` share: reading the command line, one line for an error, one for the figures."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import tyro

from effjax.errors import EffjaxError


def run(
    config: type, train: Callable[[Any], Mapping[str, float] | None], *, prog: str, description: str | None
) -> None:
    """Trains as the command line says; an error that effjax raised on purpose is one line and exit code 1.

    Args:
        config: the dataclass that holds the options, `out` among them.
        train: gives the figures to print, or None where the run was interrupted.
        prog: as the command is called.
        description: for `--help`.
    """
    try:
        options = tyro.cli(config, prog=prog, description=description)
        figures = train(options)
    except EffjaxError as error:
        sys.exit(f"error: {error}")
    if figures is not None:
        print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        print(f"wrote {options.out / 'model'}")
