"""`effjax verify`: is this checkpoint whole?"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from effjax.errors import EffjaxError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Looks for damage: hashes of files and tensors, shapes, values that are not finite.

    Exit code 1 when there are findings. Takes directories that effjax wrote, and dense Hugging Face directories, which
    carry no hashes.
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
    """The model."""

    def run(self) -> int:
        from effjax.io.checkpoint import is_checkpoint, verify_checkpoint
        from effjax.models.hf import load_model

        hashed = is_checkpoint(self.directory) or (self.directory / "recipe.yaml").exists()
        if not self.directory.is_dir():
            raise FileNotFoundError(2, "no such directory", str(self.directory))
        if hashed:
            findings = verify_checkpoint(self.directory)
        else:
            try:
                load_model(self.directory)
                findings = []
            except EffjaxError as error:
                findings = [str(error)]
        for finding in findings:
            print(f"{self.directory}: {finding}")
        if not findings:
            print(f"{self.directory}: whole" + ("" if hashed else " (it carries no hashes: shapes and values only)"))
        return 1 if findings else 0
