"""Kept for one import; see effjax.io.safetensors_file."""

from effjax.io.safetensors_file import TensorEntry, read_entries

__all__ = ["TensorEntry", "read_entries"]
