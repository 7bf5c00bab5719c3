"""The key-value cache, the methods that evict from it, and the codings that it can hold keys and values by."""

from effjax.kv.cache import KVCache, init_cache, resize
from effjax.kv.coders import KVCoders, fit_layers
from effjax.kv.coders_file import load_coders, save_coders
from effjax.kv.coding import Coded, Coder
from effjax.kv.cq import CQ
from effjax.kv.evict import kv_evict
from effjax.kv.flax_cache import flax_attention, from_flax, to_flax
from effjax.kv.h2o import H2O
from effjax.kv.importance import Importance
from effjax.kv.integer import IntKV
from effjax.kv.kivi import KIVI
from effjax.kv.kvquant import KVQuant
from effjax.kv.method import EvictionMethod
from effjax.kv.nomad import NoMAD
from effjax.kv.persistence import layer_budgets, persistence
from effjax.kv.scissorhands import Scissorhands
from effjax.kv.sink_window import SinkWindow
from effjax.kv.snapkv import PyramidKV, SnapKV
from effjax.kv.tova import TOVA

StreamingLLM = SinkWindow

__all__ = [
    "CQ",
    "H2O",
    "KIVI",
    "TOVA",
    "Coded",
    "Coder",
    "EvictionMethod",
    "Importance",
    "IntKV",
    "KVCache",
    "KVCoders",
    "KVQuant",
    "NoMAD",
    "PyramidKV",
    "Scissorhands",
    "SinkWindow",
    "SnapKV",
    "StreamingLLM",
    "fit_layers",
    "flax_attention",
    "from_flax",
    "init_cache",
    "kv_evict",
    "layer_budgets",
    "load_coders",
    "persistence",
    "resize",
    "save_coders",
    "to_flax",
]
