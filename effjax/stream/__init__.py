"""Checkpoints larger than memory: read, compressed and written unit by unit, inside a budget, resumable."""

from effjax.stream.engine import Job, Row, Streamed, compress_checkpoint
from effjax.stream.memory import parse_bytes
from effjax.stream.schedule import Schedule, Unit, make_schedule
from effjax.stream.source import Source, open_source

__all__ = [
    "Job",
    "Row",
    "Schedule",
    "Source",
    "Streamed",
    "Unit",
    "compress_checkpoint",
    "make_schedule",
    "open_source",
    "parse_bytes",
]
