"""The tensor types of GGUF: their numbers, names, and the size of a block."""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorType:
    """One tensor type.

    Attributes:
        number: what the file stores.
        name: as in "Q4_K".
        elements: weights a block, consecutive along the fastest axis.
        nbytes: bytes a block.
        dtype: of plain types, whose blocks are one number; None for the others.
    """

    number: int
    name: str
    elements: int
    nbytes: int
    dtype: np.dtype | None = None

    def row_bytes(self, n: int) -> int:
        """Bytes that a row of `n` weights takes; `n` is a multiple of `elements`."""
        return n // self.elements * self.nbytes


def _plain(number: int, name: str, dtype: type) -> TensorType:
    return TensorType(number, name, 1, np.dtype(dtype).itemsize, np.dtype(dtype))


# Types that are only known by size are listed too: a file that has one among others can still be read.
_TYPES = (
    _plain(0, "F32", np.float32),
    _plain(1, "F16", np.float16),
    TensorType(2, "Q4_0", 32, 18),
    TensorType(3, "Q4_1", 32, 20),
    TensorType(6, "Q5_0", 32, 22),
    TensorType(7, "Q5_1", 32, 24),
    TensorType(8, "Q8_0", 32, 34),
    TensorType(9, "Q8_1", 32, 40),
    TensorType(10, "Q2_K", 256, 84),
    TensorType(11, "Q3_K", 256, 110),
    TensorType(12, "Q4_K", 256, 144),
    TensorType(13, "Q5_K", 256, 176),
    TensorType(14, "Q6_K", 256, 210),
    TensorType(15, "Q8_K", 256, 292),
    TensorType(16, "IQ2_XXS", 256, 66),
    TensorType(17, "IQ2_XS", 256, 74),
    TensorType(18, "IQ3_XXS", 256, 98),
    TensorType(19, "IQ1_S", 256, 50),
    TensorType(20, "IQ4_NL", 32, 18),
    TensorType(21, "IQ3_S", 256, 110),
    TensorType(22, "IQ2_S", 256, 82),
    TensorType(23, "IQ4_XS", 256, 136),
    _plain(24, "I8", np.int8),
    _plain(25, "I16", np.int16),
    _plain(26, "I32", np.int32),
    _plain(27, "I64", np.int64),
    _plain(28, "F64", np.float64),
    TensorType(29, "IQ1_M", 256, 56),
    _plain(30, "BF16", ml_dtypes.bfloat16),
    TensorType(34, "TQ1_0", 256, 54),
    TensorType(35, "TQ2_0", 256, 66),
    TensorType(39, "MXFP4", 32, 17),
    TensorType(40, "NVFP4", 64, 36),
    TensorType(41, "Q1_0", 128, 18),
)
BY_NUMBER: Mapping[int, TensorType] = {kind.number: kind for kind in _TYPES}
BY_NAME: Mapping[str, TensorType] = {kind.name: kind for kind in _TYPES}
