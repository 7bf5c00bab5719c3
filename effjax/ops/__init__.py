"""The hot operations: one signature each, a plain reference that defines it, and the choice of implementation."""

from effjax.ops.attention import decode_attention, paged_decode_attention
from effjax.ops.coded_slots import CodedSlots
from effjax.ops.dispatch import explain
from effjax.ops.label_top_k import LabelTopK, label_top_k
from effjax.ops.matmul import matmul
from effjax.ops.neurons import Neurons, make_neurons
from effjax.ops.products import codebook_matmul, hashed_matmul, nm_matmul, quant_matmul
from effjax.ops.representer import representer_query
from effjax.ops.sparse_mlp import choose_neurons, sparse_mlp

__all__ = [
    "CodedSlots",
    "LabelTopK",
    "Neurons",
    "choose_neurons",
    "codebook_matmul",
    "decode_attention",
    "explain",
    "hashed_matmul",
    "label_top_k",
    "make_neurons",
    "matmul",
    "nm_matmul",
    "paged_decode_attention",
    "quant_matmul",
    "representer_query",
    "sparse_mlp",
]
