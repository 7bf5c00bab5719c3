"""Knowledge distillation: losses by outputs and by features, committees of teachers, and a store of their outputs."""

from effjax.distill.attention import attention_map, attention_transfer_loss
from effjax.distill.cliptex import (
    TaskSpec,
    balanced,
    class_loss,
    cliptex_losses,
    depth_loss,
    flip,
    init_heads,
    linear_task,
    normal_loss,
    strip_heads,
    weighted_sum,
)
from effjax.distill.committee import Committee, Seen, Teacher, diverse_init, strip
from effjax.distill.contrastive import contrastive_loss, symmetric_contrastive_loss
from effjax.distill.curate import curate, query_counts
from effjax.distill.diverse import Batch, Diverse, DiverseTerms, diverse_loss
from effjax.distill.features import hint_loss, init_projection, project
from effjax.distill.logits import TopK, kl_divergence, top_k_divergence, top_k_targets
from effjax.distill.merge import (
    apply_text_head,
    cosine_loss,
    focal_dice_loss,
    in_turn,
    init_text_head,
    mask_loss,
    module_rates,
    text_head_loss,
    text_segment,
)
from effjax.distill.mlp import apply_mlp, halves, init_mlp, layer_outputs
from effjax.distill.progressive import pskd_loss, pskd_weight
from effjax.distill.pseudo_labels import IGNORE, Expert, LabelStore, open_labels, write_labels
from effjax.distill.store import StoreConfig, TeacherStore, open_store, write_store
from effjax.distill.transfer import KeepBest, adapt, agnostic_loss, keep_best, label_loss, transfer_loss

__all__ = [
    "Batch",
    "Committee",
    "Diverse",
    "DiverseTerms",
    "Expert",
    "IGNORE",
    "KeepBest",
    "LabelStore",
    "Seen",
    "StoreConfig",
    "TaskSpec",
    "Teacher",
    "TeacherStore",
    "TopK",
    "adapt",
    "agnostic_loss",
    "apply_mlp",
    "apply_text_head",
    "attention_map",
    "attention_transfer_loss",
    "balanced",
    "class_loss",
    "cliptex_losses",
    "contrastive_loss",
    "cosine_loss",
    "curate",
    "depth_loss",
    "diverse_init",
    "diverse_loss",
    "flip",
    "focal_dice_loss",
    "halves",
    "hint_loss",
    "in_turn",
    "init_heads",
    "init_mlp",
    "init_projection",
    "init_text_head",
    "keep_best",
    "kl_divergence",
    "label_loss",
    "layer_outputs",
    "linear_task",
    "mask_loss",
    "module_rates",
    "normal_loss",
    "open_labels",
    "open_store",
    "project",
    "pskd_loss",
    "pskd_weight",
    "query_counts",
    "strip",
    "strip_heads",
    "symmetric_contrastive_loss",
    "text_head_loss",
    "text_segment",
    "top_k_divergence",
    "top_k_targets",
    "transfer_loss",
    "weighted_sum",
    "write_labels",
    "write_store",
]
