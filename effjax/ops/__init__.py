"""The hot operations: one signature each, a plain reference that defines it, and the choice of implementation."""

from effjax.ops.dispatch import explain
from effjax.ops.matmul import matmul
from effjax.ops.products import codebook_matmul, hashed_matmul, nm_matmul, quant_matmul

__all__ = ["codebook_matmul", "explain", "hashed_matmul", "matmul", "nm_matmul", "quant_matmul"]
