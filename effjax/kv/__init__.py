"""The key-value cache and the methods that evict from it."""

from effjax.kv.cache import KVCache, init_cache, resize
from effjax.kv.evict import EvictionMethod, kv_evict
from effjax.kv.sink_window import SinkWindow

__all__ = ["EvictionMethod", "KVCache", "SinkWindow", "init_cache", "kv_evict", "resize"]
