"""effjax: smaller and faster neural networks with pure functions over parameter pytrees."""

from effjax import arrays, distill, io, kv, ops, prune, quantize, sketch, sparsity
from effjax.adapters import add_lora, drop_adapters, partition_adapters
from effjax.arrays import is_compressed, materialize, nbytes, partition_specs
from effjax.kv import kv_evict
from effjax.lift import add_stats, calibrate, lift
from effjax.prepare import prepare, restore
from effjax.prune import apply_mask, pack_mask, prune_mask
from effjax.quantize import merge_adapters, quantize_params
from effjax.sketch import sketch_params
from effjax.tree import combine, partition, report, summary

__all__ = [
    "add_lora",
    "add_stats",
    "apply_mask",
    "arrays",
    "calibrate",
    "combine",
    "distill",
    "drop_adapters",
    "io",
    "is_compressed",
    "kv",
    "kv_evict",
    "lift",
    "materialize",
    "merge_adapters",
    "nbytes",
    "ops",
    "pack_mask",
    "partition",
    "partition_adapters",
    "partition_specs",
    "prepare",
    "prune",
    "prune_mask",
    "quantize",
    "quantize_params",
    "report",
    "restore",
    "sketch",
    "sketch_params",
    "sparsity",
    "summary",
]
