"""The STREAM triad: the bytes a second that memory gives, which bandwidth-bound products are measured by; and what
counts as memory: more than the last-level cache holds."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def triad(threads: int, *, size: int = 1 << 25, repeats: int = 7) -> float:
    """Bytes a second of `a = b + s * c` on float32 arrays beyond any cache, counted as STREAM does: two read, one
    written."""
    b, c, a = (np.full(size, value, np.float32) for value in (1.0, 2.0, 0.0))
    block = 1 << 14  # the product of a block stays in the first-level cache

    def part(index: int) -> None:
        product = np.empty(block, np.float32)
        for start in range(index * size // threads, (index + 1) * size // threads, block):
            span = slice(start, start + block)
            np.multiply(c[span], np.float32(3), out=product)
            np.add(b[span], product, out=a[span])

    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(part, range(threads)))
            times.append(time.perf_counter() - began)
    return 3 * 4 * size / min(times)


def last_level_cache() -> int:
    """Bytes of the largest cache that Linux names for the first core, 0 where it names none."""
    sizes = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [re.fullmatch(r"(\d+)([KM])\s*", size) for size in sizes]
    return max((int(m[1]) << {"K": 10, "M": 20}[m[2]] for m in found if m), default=0)
