"""LLM in a flash: weights that stay on flash, read neuron by neuron as a text needs them."""

from effjax.flash.bundles import FeedForward, Layout, bundle_ffn, unbundle
from effjax.flash.cache import NeuronCache, apply_update, empty_cache, plan_update
from effjax.flash.cost import (
    Device,
    Estimate,
    fit_device,
    independent_shares,
    io_table,
    largest_window,
    measure_device,
    most_resident,
    predict_reads,
    used_shares,
)
from effjax.flash.decode import FlashDecoder, LayerTrace, generate_from_flash
from effjax.flash.file import BundleFile, load_layer, open_bundles, verify_bundles, write_bundles
from effjax.flash.memory import MemoryPlan, plan_memory
from effjax.flash.model import Every, Oracle, apply_windowed, feed_forwards, oracles, resident_params, windowed
from effjax.flash.product import ffn_prefix
from effjax.flash.reader import ReadCount, RowReader, aligned_empty, plan_requests

__all__ = [
    "BundleFile",
    "Device",
    "Estimate",
    "Every",
    "FeedForward",
    "FlashDecoder",
    "LayerTrace",
    "Layout",
    "MemoryPlan",
    "NeuronCache",
    "Oracle",
    "ReadCount",
    "RowReader",
    "aligned_empty",
    "apply_update",
    "apply_windowed",
    "bundle_ffn",
    "empty_cache",
    "feed_forwards",
    "ffn_prefix",
    "fit_device",
    "generate_from_flash",
    "independent_shares",
    "io_table",
    "largest_window",
    "load_layer",
    "measure_device",
    "most_resident",
    "open_bundles",
    "oracles",
    "plan_memory",
    "plan_requests",
    "plan_update",
    "predict_reads",
    "resident_params",
    "unbundle",
    "used_shares",
    "verify_bundles",
    "windowed",
    "write_bundles",
]
