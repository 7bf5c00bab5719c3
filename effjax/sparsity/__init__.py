"""Sparsity that depends on the input: which neurons, heads and labels a token needs."""

from effjax.sparsity.by_neuron import by_neuron, neuron_apply
from effjax.sparsity.decoder import apply_contextual, decoder_taps
from effjax.sparsity.dejavu import collect_sparsity, contextual_mlp, neuron_masks, train_predictors
from effjax.sparsity.generate_reusing import generate_reusing
from effjax.sparsity.heads import chosen_heads, head_sparse_attention
from effjax.sparsity.label_head import LabelHead, build_label_head, frequent_labels, sampled_softmax_loss
from effjax.sparsity.label_tables import LabelTables, build_tables, retrieve
from effjax.sparsity.lss import LSS, TrainedHashes, train_hashes
from effjax.sparsity.predictor import Predictor, Training
from effjax.sparsity.relu import flops_share, relufy, shift_for, zero_shares

__all__ = [
    "LSS",
    "LabelHead",
    "LabelTables",
    "Predictor",
    "TrainedHashes",
    "Training",
    "apply_contextual",
    "build_label_head",
    "build_tables",
    "by_neuron",
    "chosen_heads",
    "collect_sparsity",
    "contextual_mlp",
    "decoder_taps",
    "flops_share",
    "frequent_labels",
    "generate_reusing",
    "head_sparse_attention",
    "neuron_apply",
    "neuron_masks",
    "relufy",
    "retrieve",
    "sampled_softmax_loss",
    "shift_for",
    "train_hashes",
    "train_predictors",
    "zero_shares",
]
