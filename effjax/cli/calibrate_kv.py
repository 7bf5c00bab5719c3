"""`effjax calibrate-kv`: learns the tables by which a cache holds codes, once for all texts."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from effjax.cli.console import say
from effjax.cli.inputs import CalibratingKV, ModelName, Switch, open_model
from effjax.errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateKV:
    """Learns how a model's keys and values are coded, and writes it to a file for `effjax generate --kv-code FILE`."""

    model: ModelName = "default"
    """Directory (dense or compressed), hub id, or "default"."""
    code: str = "cq2"
    """cq1, cq2, cq4 (coupled channels, so many bits each), cq-8c8b and the like, kvquant1 to kvquant8, int1 to int8;
    nomad1, nomad2, nomad4 (keys alone, looked up: for long texts on a CPU)."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = Path("kv.safetensors")
    """File to write, kv.safetensors by default."""
    overwrite: Switch = False
    """Replaces a file that exists already."""
    calibrating: CalibratingKV = dataclasses.field(default_factory=CalibratingKV)

    def run(self) -> int:
        from effjax.cli.kv import learned
        from effjax.kv.coders_file import save_coders

        if self.out.exists() and not self.overwrite:
            raise CheckpointError(f"{self.out} exists already: choose another --out, or add --overwrite to replace it")
        model = open_model(self.model).model
        coders = learned(self.code, model, self.calibrating)
        save_coders(self.out, coders, overwrite=self.overwrite)
        shape = (1, model.config.num_key_value_heads, 1024, model.config.head_dim)
        bits = coders.bits_per_channel(shape, tables=False)
        say(f"{self.out}: {self.code}, {bits:.3g} bits a number, tables of {coders.nbytes:,} bytes")
        return 0
