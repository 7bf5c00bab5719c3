"""The compressed array types, one file a type, and the functions over trees of them."""

from effjax.arrays.adapter import Adapter
from effjax.arrays.base import CompressedArray, is_compressed, materialize, nbytes
from effjax.arrays.codebook import Codebook
from effjax.arrays.hashed import Hashed
from effjax.arrays.low_rank import LowRank
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.packing import pack, packed_size, unpack
from effjax.arrays.permuted import Permuted
from effjax.arrays.prepared import Prepared
from effjax.arrays.quantized import Quantized
from effjax.arrays.row_scaled import RowScaled
from effjax.arrays.sharding import partition_specs
from effjax.arrays.shared import Shared
from effjax.arrays.sum import Sum
from effjax.arrays.user_tables import UserTables
from effjax.arrays.view import View, fold, unfold

__all__ = [
    "Adapter",
    "Codebook",
    "CompressedArray",
    "Hashed",
    "LowRank",
    "NMSparse",
    "Permuted",
    "Prepared",
    "Quantized",
    "RowScaled",
    "Shared",
    "Sum",
    "UserTables",
    "View",
    "fold",
    "is_compressed",
    "materialize",
    "nbytes",
    "pack",
    "packed_size",
    "partition_specs",
    "unfold",
    "unpack",
]
