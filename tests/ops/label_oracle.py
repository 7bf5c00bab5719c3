"""Label tables by sets and loops of Python: what retrieves, and what ranks best."""

import numpy as np


def codes_of(points, directions):
    """`[n, tables]` of points that already have their last channel."""
    signs = np.einsum("nd,dkt->nkt", points.astype(np.float64), directions.astype(np.float64)) >= 0
    return (signs * 2 ** np.arange(directions.shape[1])[:, None]).sum(1)


def buckets_of(codes, count):
    """For each table, a list of the labels in each of `count` buckets."""
    return [[[j for j in range(len(codes)) if codes[j, t] == c] for c in range(count)] for t in range(codes.shape[1])]


def laid_out(buckets):
    """The arrays `ids` and `offsets`."""
    ids = np.array([[j for bucket in table for j in bucket] for table in buckets], np.int32)
    offsets = np.array([np.cumsum([0, *map(len, table)]) for table in buckets], np.int32)
    return ids, offsets


def top_k(h, directions, buckets, weights, bias, fallback, k):
    """Values, labels and numbers scored, of float64 logits."""
    found = codes_of(np.concatenate([h, np.ones((len(h), 1))], 1), directions)
    values, labels, scored = np.full((len(h), k), -np.inf), np.full((len(h), k), -1), []
    for i, query in enumerate(h.astype(np.float64)):
        union = {j for t, table in enumerate(buckets) for j in table[found[i, t]]}
        if len(union) < k:
            union |= set(map(int, fallback))
        logits = {j: float(query @ weights[j].astype(np.float64) + bias[j]) for j in union}
        best = sorted(union, key=lambda j: (-logits[j], j))[:k]
        values[i, : len(best)], labels[i, : len(best)] = [logits[j] for j in best], best
        scored.append(len(union))
    return values, labels, np.array(scored, int)


def operands(shape, seed=0):
    """Numbers of few bits, whose products are exact in any order of summation: no code and no rank depends on rounding.

    `shape` is batch, d, hashes, tables, labels, fallback labels, k.
    """
    batch, d, hashes, tables, labels, spare, _ = shape
    rng = np.random.default_rng(seed)

    def few(*shape):
        return rng.integers(-16, 17, shape).astype(np.float32) / 8

    h, directions, weights, bias = few(batch, d), few(d + 1, hashes, tables), few(labels, d), few(labels)
    points = np.concatenate([weights, bias[:, None]], 1)
    buckets = buckets_of(codes_of(points, directions), 2**hashes)
    fallback = rng.integers(0, labels, spare).astype(np.int32)
    return h, directions, buckets, weights, bias, fallback
