"""Weight sketches: `sketch_params` and its methods; and the Representer Sketch, which replaces a whole network."""

from effjax.sketch.api import sketch_params
from effjax.sketch.hashed import Hashed
from effjax.sketch.low_rank import LowRank
from effjax.sketch.representer import RepresenterSketch, build_sketch, query_sketch
from effjax.sketch.representer_file import load_sketch, save_sketch
from effjax.sketch.representer_kernel import RepresenterKernel, distillation_loss, init_representer

__all__ = [
    "Hashed",
    "LowRank",
    "RepresenterKernel",
    "RepresenterSketch",
    "build_sketch",
    "distillation_loss",
    "init_representer",
    "load_sketch",
    "query_sketch",
    "save_sketch",
    "sketch_params",
]
