"""Knowledge distillation: losses by outputs and by features, committees of teachers, and a store of their outputs."""

from effjax.distill.attention import attention_map, attention_transfer_loss
from effjax.distill.committee import Committee, Seen, Teacher, diverse_init, strip
from effjax.distill.contrastive import contrastive_loss, symmetric_contrastive_loss
from effjax.distill.diverse import Batch, Diverse, DiverseTerms, diverse_loss
from effjax.distill.features import hint_loss, init_projection, project
from effjax.distill.logits import TopK, kl_divergence, top_k_divergence, top_k_targets
from effjax.distill.mlp import apply_mlp, halves, init_mlp, layer_outputs
from effjax.distill.progressive import pskd_loss, pskd_weight
from effjax.distill.store import StoreConfig, TeacherStore, open_store, write_store

__all__ = [
    "Batch",
    "Committee",
    "Diverse",
    "DiverseTerms",
    "Seen",
    "StoreConfig",
    "Teacher",
    "TeacherStore",
    "TopK",
    "apply_mlp",
    "attention_map",
    "attention_transfer_loss",
    "contrastive_loss",
    "diverse_init",
    "diverse_loss",
    "halves",
    "hint_loss",
    "init_mlp",
    "init_projection",
    "kl_divergence",
    "layer_outputs",
    "open_store",
    "project",
    "pskd_loss",
    "pskd_weight",
    "strip",
    "symmetric_contrastive_loss",
    "top_k_divergence",
    "top_k_targets",
    "write_store",
]
