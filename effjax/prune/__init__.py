"""Pruning: `prune_mask`, `apply_mask`, `pack_mask`, the scores, training under masks, and models that shrink."""

from effjax.prune.api import apply_mask, pack_mask, prune_mask
from effjax.prune.at_init import grasp, snip, synflow, synflow_scores
from effjax.prune.groups import CoupledGroups, Group, coupled_groups
from effjax.prune.highest import Highest
from effjax.prune.layers import block_influence
from effjax.prune.magnitude import Magnitude
from effjax.prune.pattern import Pattern
from effjax.prune.random import Random
from effjax.prune.schedules import cubic_sparsity, erk_sparsities, geometric_sparsity
from effjax.prune.shrink import kept_units, shrink
from effjax.prune.sparse_training import GraNet, RigL, SparseState, sparse_training
from effjax.prune.sparsegpt import SparseGPT, repair
from effjax.prune.structured import Structured, magnitude_scores, random_scores, structured_mask, taylor_scores
from effjax.prune.wanda import Wanda

__all__ = [
    "CoupledGroups",
    "GraNet",
    "Group",
    "Highest",
    "Magnitude",
    "Pattern",
    "Random",
    "RigL",
    "SparseGPT",
    "SparseState",
    "Structured",
    "Wanda",
    "apply_mask",
    "block_influence",
    "coupled_groups",
    "cubic_sparsity",
    "erk_sparsities",
    "geometric_sparsity",
    "grasp",
    "kept_units",
    "magnitude_scores",
    "pack_mask",
    "prune_mask",
    "random_scores",
    "repair",
    "shrink",
    "snip",
    "sparse_training",
    "structured_mask",
    "synflow",
    "synflow_scores",
    "taylor_scores",
]
