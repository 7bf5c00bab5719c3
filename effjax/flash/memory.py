"""The memory that decoding from flash takes, term by term, against a budget: reckoned before any of it is taken."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from effjax.errors import ConfigError
from effjax.flash.file import BundleFile
from effjax.flash.reader import MOST, UNITS
from effjax.models.config import DecoderConfig
from effjax.models.decoder import new_cache

PASSING = 4 << 20  # bytes of rows that are read for one token and not kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What is held, in bytes.

    Attributes:
        terms: by name.
        capacity: rows of each layer's neuron cache.
        passing: rows of the buffer for neurons that are not kept.
        budget: the bound.
    """

    terms: dict[str, int]
    capacity: tuple[int, ...]
    passing: int
    budget: int

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def text(self) -> str:
        """The sum, written out."""
        return " + ".join(f"{name} {size:,}" for name, size in self.terms.items()) + f" = {self.total:,} bytes"


def plan_memory(
    config: DecoderConfig,
    params: PyTree,
    predictors: Sequence[Any],
    file: BundleFile,
    *,
    budget: int,
    slots: int,
    capacity: int | Sequence[int] | None = None,
    passing: int | None = None,
    threads: int = 15,
    gap: int = 0,
) -> MemoryPlan:
    """What a decoder will hold; works on abstract shapes.

    The interpreter, the compiled programs and what they hold while they run come on top and are the same for any model
    of these sizes.

    Args:
        params: of `resident_params`, arrays or their shapes; likewise the predictors.
        file: of the feed-forward layers.
        budget: bytes.
        slots: tokens of the key-value cache.
        capacity: rows of each layer's neuron cache, one number or one a layer; None takes all that the budget leaves,
            alike for all layers.
        passing: rows of the buffer for neurons that find no room in the cache; None takes 4 MiB of them.
        threads, gap: of the reader.

    Raises:
        ConfigError: all that does not fit into the budget, or a decoder and a file that are not of one model.
    """
    width = config.one_width("a file of bundles")
    wanted = (config.num_hidden_layers, width, config.hidden_size, not config.is_opt)
    found = (file.layers, file.neurons, file.layout.width, file.layout.gated)
    if wanted != found or len(predictors) != file.layers:
        raise ConfigError(
            f"{file.path} holds (layers, neurons, width, gate) = {found} and the decoder has {wanted} with "
            f"{len(predictors)} predictors; write the file from this decoder's feed_forwards"
        )
    stride = file.layout.stride
    if passing is None:
        passing = max(1, min(file.neurons, PASSING // stride))
    cache = jax.eval_shape(lambda: new_cache(config, batch=1, slots=slots, dtype="float32"))
    beside = stride % UNITS[0] != 0 or gap > 0
    terms = {
        "resident weights": _bytes(params),
        "predictors": _bytes(list(predictors)),
        "biases and scales": file.side_bytes,
        "key-value cache": _bytes(cache),
        "rows that pass": passing * stride,
        "read beside rows": (threads + 1) * (MOST + 2 * UNITS[-1]) if beside else 0,
        "last uses": 8 * file.layers * file.neurons,
    }
    row = stride + 8 + 4 * (2 + 3 * file.layout.coded)  # with its neuron, its biases and its scales
    if capacity is None:
        capacity = max(0, min(file.neurons, (budget - sum(terms.values())) // (row * file.layers)))
    each = (capacity,) * file.layers if isinstance(capacity, int) else tuple(capacity)
    if len(each) != file.layers or not all(0 <= c <= file.neurons for c in each):
        raise ConfigError(f"capacity={each}: one for each of {file.layers} layers, from 0 to {file.neurons}")
    terms["neuron caches"] = sum(each) * row
    plan = MemoryPlan(terms=terms, capacity=each, passing=passing, budget=budget)
    if plan.total > budget:
        raise ConfigError(
            f"{plan.text()}, {plan.total - budget:,} more than the budget of {budget:,}; raise the budget, or take "
            "smaller caches, fewer slots, or narrower weights"
        )
    return plan


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
