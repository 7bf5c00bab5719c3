"""effjax: smaller and faster neural networks with pure functions over parameter pytrees."""

from effjax import arrays, ops, quantize
from effjax.arrays import is_compressed, materialize, nbytes, partition_specs
from effjax.lift import add_stats, calibrate, lift
from effjax.quantize import quantize_params

__all__ = ["add_stats", "arrays", "calibrate", "is_compressed", "lift", "materialize", "nbytes", "ops", "partition_specs", "quantize", "quantize_params"]
