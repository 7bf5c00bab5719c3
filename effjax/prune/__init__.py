"""Pruning: `prune_mask`, `apply_mask`, `pack_mask` and the scores."""

from effjax.prune.api import apply_mask, pack_mask, prune_mask
from effjax.prune.magnitude import Magnitude
from effjax.prune.pattern import Pattern
from effjax.prune.random import Random
from effjax.prune.sparsegpt import SparseGPT, repair
from effjax.prune.wanda import Wanda

__all__ = [
    "Magnitude",
    "Pattern",
    "Random",
    "SparseGPT",
    "Wanda",
    "apply_mask",
    "pack_mask",
    "prune_mask",
    "repair",
]
