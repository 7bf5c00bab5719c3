"""Weight quantization: `quantize_params` and its methods."""

from effjax.quantize.api import quantize_params
from effjax.quantize.nf4 import NF4
from effjax.quantize.rtn import RTN

__all__ = ["NF4", "RTN", "quantize_params"]
