"""Weight sketches: `sketch_params` and its methods; tables to train, serve and share; representer sketches."""

from effjax.sketch.api import sketch_params
from effjax.sketch.embedding import feature_seeds, robe_lookup, unified_lookup
from effjax.sketch.hashed import Hashed
from effjax.sketch.low_rank import LowRank
from effjax.sketch.representer import RepresenterSketch, build_sketch, query_sketch
from effjax.sketch.representer_file import load_sketch, save_sketch
from effjax.sketch.representer_kernel import RepresenterKernel, distillation_loss, init_representer
from effjax.sketch.roast import ROAST
from effjax.sketch.sharing import SharedParams, expand, share_params
from effjax.sketch.spallm import SpaLLM
from effjax.sketch.stable_rps import SlotScales, StableRPS, scale_gradients, scale_updates, slot_scales
from effjax.sketch.subspace import Subspace, average

__all__ = [
    "ROAST",
    "Hashed",
    "LowRank",
    "RepresenterKernel",
    "RepresenterSketch",
    "SharedParams",
    "SlotScales",
    "SpaLLM",
    "StableRPS",
    "Subspace",
    "average",
    "build_sketch",
    "distillation_loss",
    "expand",
    "feature_seeds",
    "init_representer",
    "load_sketch",
    "query_sketch",
    "robe_lookup",
    "save_sketch",
    "scale_gradients",
    "scale_updates",
    "share_params",
    "sketch_params",
    "slot_scales",
    "unified_lookup",
]
