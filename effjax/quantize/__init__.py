"""Weight quantization: `quantize_params` and its methods."""

from effjax.quantize.allocate import allocate, family
from effjax.quantize.api import quantize_params
from effjax.quantize.awq import AWQ
from effjax.quantize.dkm import DKM, dkm_soft
from effjax.quantize.edkm import EDKM, edkm_soft
from effjax.quantize.fold import fold_scales
from effjax.quantize.fp4 import FP4, MXFP4, NVFP4
from effjax.quantize.fp8 import FP8
from effjax.quantize.gptq import GPTQ
from effjax.quantize.hqq import HQQ
from effjax.quantize.kept import quantize_kept
from effjax.quantize.leanquant import LeanQuant
from effjax.quantize.merge import LeafMerge, MergeReport, merge_adapters
from effjax.quantize.nf4 import NF4
from effjax.quantize.palettize import Clusters, harden, init_clusters, palettize
from effjax.quantize.regrid import regrid
from effjax.quantize.rtn import RTN
from effjax.quantize.sensitivity import Sensitivity, sensitivity
from effjax.quantize.squeezellm import SqueezeLLM

__all__ = [
    "AWQ",
    "DKM",
    "EDKM",
    "FP4",
    "FP8",
    "GPTQ",
    "HQQ",
    "MXFP4",
    "NF4",
    "NVFP4",
    "RTN",
    "Clusters",
    "LeafMerge",
    "LeanQuant",
    "MergeReport",
    "Sensitivity",
    "SqueezeLLM",
    "allocate",
    "dkm_soft",
    "edkm_soft",
    "family",
    "fold_scales",
    "harden",
    "init_clusters",
    "merge_adapters",
    "palettize",
    "quantize_kept",
    "quantize_params",
    "regrid",
    "sensitivity",
]
