"""The hot operations: one signature each, a plain reference that defines it, and the choice of implementation."""

from effjax.ops.matmul import matmul

__all__ = ["matmul"]
