"""Weight quantization: `quantize_params` and its methods."""

from effjax.quantize.allocate import allocate, family
from effjax.quantize.api import quantize_params
from effjax.quantize.dkm import DKM, dkm_soft
from effjax.quantize.edkm import EDKM, edkm_soft
from effjax.quantize.fp4 import FP4, MXFP4, NVFP4
from effjax.quantize.fp8 import FP8
from effjax.quantize.nf4 import NF4
from effjax.quantize.palettize import Clusters, harden, init_clusters, palettize
from effjax.quantize.rtn import RTN
from effjax.quantize.sensitivity import Sensitivity, sensitivity

__all__ = [
    "DKM",
    "EDKM",
    "Clusters",
    "dkm_soft",
    "edkm_soft",
    "harden",
    "init_clusters",
    "palettize",
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "NVFP4",
    "RTN",
    "Sensitivity",
    "allocate",
    "family",
    "quantize_params",
    "sensitivity",
]
