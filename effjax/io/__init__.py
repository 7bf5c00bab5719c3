"""Compressed models on disk: safetensors directories and Orbax checkpoints; never pickle."""

from effjax.io.checkpoint import LoadedCheckpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from effjax.io.formats.exactness import Exactness, exactness
from effjax.io.orbax import load_orbax, save_orbax

__all__ = [
    "Exactness",
    "LoadedCheckpoint",
    "exactness",
    "load_checkpoint",
    "load_orbax",
    "save_checkpoint",
    "save_orbax",
    "verify_checkpoint",
]
