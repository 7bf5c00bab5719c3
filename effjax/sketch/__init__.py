"""Weight sketches: `sketch_params` and its methods; tables to train, serve and share; representer sketches."""

from effjax.sketch.api import sketch_params
from effjax.sketch.embedding import feature_seeds, robe_lookup, unified_lookup
from effjax.sketch.hashed import Hashed
from effjax.sketch.low_rank import LowRank
from effjax.sketch.lq_lora import LqLora
from effjax.sketch.representer import RepresenterSketch, build_sketch, query_sketch
from effjax.sketch.representer_file import load_sketch, save_sketch
from effjax.sketch.representer_kernel import RepresenterKernel, distillation_loss, init_representer
from effjax.sketch.representer_refit import refit_sketch
from effjax.sketch.roast import ROAST
from effjax.sketch.serving import for_users, of_user, stack_tables
from effjax.sketch.sharing import SharedParams, expand, share_params
from effjax.sketch.spallm import SpaLLM
from effjax.sketch.stable_rps import SlotScales, StableRPS, scale_gradients, scale_updates, slot_scales
from effjax.sketch.subspace import Subspace, average
from effjax.sketch.tables import partition_tables, scale_by_spread

__all__ = [
    "ROAST",
    "Hashed",
    "LowRank",
    "LqLora",
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
    "for_users",
    "init_representer",
    "load_sketch",
    "of_user",
    "partition_tables",
    "query_sketch",
    "refit_sketch",
    "robe_lookup",
    "save_sketch",
    "scale_by_spread",
    "scale_gradients",
    "scale_updates",
    "share_params",
    "sketch_params",
    "slot_scales",
    "stack_tables",
    "unified_lookup",
]
