"""Weight sketches: `sketch_params` and its methods."""

from effjax.sketch.api import sketch_params
from effjax.sketch.hashed import Hashed
from effjax.sketch.low_rank import LowRank

__all__ = ["Hashed", "LowRank", "sketch_params"]
