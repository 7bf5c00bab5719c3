"""Pruning: `prune_mask`, `apply_mask`, `pack_mask`, the scores, and training under masks."""

from effjax.prune.api import apply_mask, pack_mask, prune_mask
from effjax.prune.at_init import grasp, snip, synflow, synflow_scores
from effjax.prune.highest import Highest
from effjax.prune.magnitude import Magnitude
from effjax.prune.pattern import Pattern
from effjax.prune.random import Random
from effjax.prune.schedules import cubic_sparsity, erk_sparsities, geometric_sparsity
from effjax.prune.sparse_training import GraNet, RigL, SparseState, sparse_training
from effjax.prune.sparsegpt import SparseGPT, repair
from effjax.prune.wanda import Wanda

__all__ = [
    "GraNet",
    "Highest",
    "Magnitude",
    "Pattern",
    "Random",
    "RigL",
    "SparseGPT",
    "SparseState",
    "Wanda",
    "apply_mask",
    "cubic_sparsity",
    "erk_sparsities",
    "geometric_sparsity",
    "grasp",
    "pack_mask",
    "prune_mask",
    "repair",
    "snip",
    "sparse_training",
    "synflow",
    "synflow_scores",
]
