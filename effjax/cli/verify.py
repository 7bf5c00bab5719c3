"""`effjax verify`: is this checkpoint whole?"""

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from effjax.errors import EffjaxError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Looks for damage: hashes of files and tensors, shapes, values that are not finite.

    Exit code 1 when there are findings. Takes directories that effjax wrote, and Hugging Face directories (dense or
    quantized) and .gguf files, which carry no hashes: there a flipped bit cannot be seen, only what no writer makes.
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model."""

    def run(self) -> int:
        from effjax.io.checkpoint import is_checkpoint, verify_checkpoint
        from effjax.models.hf import load_model

        file = self.directory.suffix == ".gguf" and self.directory.is_file()
        hashed = is_checkpoint(self.directory) or (self.directory / "recipe.yaml").exists()
        if not self.directory.is_dir() and not file:
            raise FileNotFoundError(2, "no such directory", str(self.directory))
        notes: list[str] = []
        if hashed:
            findings = verify_checkpoint(self.directory)
        else:
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    load_model(self.directory)
                findings, notes = [], [str(warning.message) for warning in caught]
            except EffjaxError as error:
                findings = [str(error)]
        for finding in findings:
            print(f"{self.directory}: {finding}")
        for note in notes:
            print(f"{self.directory}: note: {note}")
        if not findings:
            unhashed = " (it carries no hashes: shapes and values only, a flipped bit cannot be seen)"
            print(f"{self.directory}: whole" + ("" if hashed else unhashed))
        return 1 if findings else 0
