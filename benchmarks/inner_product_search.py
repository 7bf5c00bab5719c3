"""Search for the largest inner products by graphs and by product quantization, of faiss: what finds large logits.

Needs `faiss-cpu` of the extra `claims`; `available()` says whether it is there.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.wide_layers import WideLayer

DEGREE, BREADTH = 32, 200  # of the graph: neighbours a label, and candidates while it is built
PARTS, RESCORED = 16, 10  # bytes of a label's code; labels rescored for each that is wanted

Search = Callable[[Any, int], tuple[np.ndarray, float]]  # (h, k) -> labels [n, k], and the share of rows read


def available() -> bool:
    return importlib.util.find_spec("faiss") is not None


def searches(layer: WideLayer) -> dict[str, Search]:
    """By name: a graph (HNSW, Malkov and Yashunin 2016) at two breadths, and PQ (Jegou et al. 2011), rescored."""
    import faiss

    labels = with_one(np.asarray(layer.kernel).T, np.asarray(layer.bias))
    graph = faiss.IndexHNSWFlat(labels.shape[1], DEGREE, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = BREADTH
    graph.add(labels)
    codes = faiss.IndexPQ(labels.shape[1], PARTS, 8, faiss.METRIC_INNER_PRODUCT)
    codes.pq.cp.min_points_per_centroid = 1  # few labels: no warning
    rescored = faiss.IndexRefineFlat(codes)
    rescored.k_factor = RESCORED
    rescored.train(labels)
    rescored.add(labels)

    def walk(breadth: int) -> Search:
        def search(h: Any, k: int) -> tuple[np.ndarray, float]:
            graph.hnsw.efSearch = breadth
            faiss.cvar.hnsw_stats.reset()
            found = graph.search(queries(h), k)[1]
            return found, faiss.cvar.hnsw_stats.ndis / len(found) / len(labels)

        return search

    def scan(h: Any, k: int) -> tuple[np.ndarray, float]:
        return rescored.search(queries(h), k)[1], min(1.0, RESCORED * k / len(labels))

    return {"HNSW, breadth 16": walk(16), "HNSW, breadth 64": walk(64), f"PQ, {RESCORED} rescored": scan}


def queries(h: Any) -> np.ndarray:
    return with_one(np.asarray(h, np.float32), np.ones(len(h), np.float32))


def with_one(x: np.ndarray, last: np.ndarray) -> np.ndarray:
    """`[x, last]` and zeros up to a multiple of `PARTS`, so that the products are the logits."""
    zeros = np.zeros((len(x), -(x.shape[1] + 1) % PARTS), np.float32)
    return np.ascontiguousarray(np.concatenate([x, last[:, None], zeros], 1), np.float32)
