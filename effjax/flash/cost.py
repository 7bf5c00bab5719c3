"""What reading costs: a device measured in a moment, and the time of a token's reads before it is decoded.

Source: Alizadeh et al., LLM in a flash (2023), section 2. The paper shows measured curves; `c / (c + half)` fits them.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from effjax.errors import ConfigError
from effjax.flash.bundles import Layout
from effjax.flash.file import BundleFile
from effjax.flash.reader import MOST, RowReader, aligned_empty

Active = Bool[np.ndarray, "layers tokens neurons"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """How fast storage is read, in chunks of `c` bytes: `bandwidth * c / (c + half)`, many at once.

    Attributes:
        bandwidth: bytes a second of very large chunks.
        half: chunk that is read at half of that, in bytes: what a request costs, in bytes that could have been read.
        call: seconds of a call, however little it reads: the latency that the first request does not share.

    Raises:
        ConfigError: a number out of range.

    Example:
        >>> paper = Device(bandwidth=6.1e9, half=3.88 * 8192)
        >>> round(paper.throughput(8192) / 1e9, 2), round(paper.throughput(2 * 8192) / 1e9, 2)
        (1.25, 2.07)
        >>> paper.seconds(requests=1000, bytes=1000 * 8192) == 1000 * 8192 / paper.throughput(8192)
        True
    """

    bandwidth: float
    half: float
    call: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.half < 0 or self.call < 0:
            raise ConfigError(f"{self}: bandwidth must be positive, half and call not negative")

    def throughput(self, chunk: float) -> float:
        """Bytes a second when read in chunks of so many bytes."""
        return self.bandwidth * chunk / (chunk + self.half)

    def seconds(self, *, requests: float, bytes: float, calls: float = 0.0) -> float:
        """Of reads that are counted together."""
        return (bytes + requests * self.half) / self.bandwidth + calls * self.call


def fit_device(requests: Float[Any, " n"], bytes: Float[Any, " n"], seconds: Float[Any, " n"]) -> Device:
    """The device that explains timed calls best, in relative error; least squares, no number below 0.

    Args:
        requests, bytes, seconds: of each call.

    Raises:
        ConfigError: times that do not grow with the bytes.

    Example:
        >>> n, size = np.array([1.0, 8, 64, 8]), np.array([512.0, 4096, 32768, 65536])
        >>> round(fit_device(n, size, 1e-4 + (size + n * 1000) / 1e8).half)
        1000
    """
    from scipy.optimize import nnls

    seconds = np.asarray(seconds, float)
    terms = np.stack([np.asarray(bytes, float), np.asarray(requests, float), np.ones(len(seconds))], 1)
    scale = terms.max(0)  # the columns differ by nine orders of magnitude
    (per_byte, per_request, call), _ = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))
    per_byte, per_request, call = np.array([per_byte, per_request, call]) / scale
    if per_byte <= 0:
        raise ConfigError("fit_device: reading more took no longer; time more calls, and larger ones")
    return Device(bandwidth=float(1 / per_byte), half=float(per_request / per_byte), call=float(call))


def measure_device(
    path: str | Path,
    *,
    chunks: Sequence[int] = (4096, 16384, 65536, 262144),
    requests: Sequence[int] = (1, 8, 32, 128),
    repeats: int = 5,
    threads: int = 15,
    seed: int = 0,
) -> Device:
    """Times random reads of a file, past the page cache, as the decoder reads: about a second.

    Args:
        path: a file on the device, at least a few times larger than what a call reads; one of bundles will do.
        chunks: bytes of a request.
        requests: of a call.
        repeats: of each size; the median counts.
        threads: of the reader.
        seed: of the places.

    Raises:
        ConfigError: the file is too small, or its system reads only through the page cache, which shows no device.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(dir=".") as file:
        ...     _ = file.write(bytes(1 << 22))
        ...     file.flush()
        ...     device = measure_device(file.name, chunks=(4096, 262144), requests=(1, 8), repeats=3)
        >>> device.bandwidth > 0
        True
    """
    size = Path(path).stat().st_size
    rng, rows = np.random.default_rng(seed), []
    for chunk in chunks:
        places = size // chunk
        if places < 2 * max(requests):
            raise ConfigError(
                f"measure_device: {path} has {size:,} bytes; {max(requests)} chunks of {chunk} need twice"
            )
        # Neighbours would share a request: every other place is left out.
        with RowReader(path, start=0, stride=chunk, rows=places, threads=threads) as reader:
            if not reader.direct:
                raise ConfigError(f"measure_device: {path} is read through the page cache; put it on another disk")
            out = aligned_empty(max(requests), chunk)
            for count in requests:
                if count * chunk > 16 * MOST:
                    continue
                times = []
                for _ in range(repeats):
                    ids = 2 * rng.choice(places // 2, count, replace=False)
                    began = time.perf_counter()
                    reader.read(ids, out)
                    times.append(time.perf_counter() - began)
                rows.append((count, count * chunk, float(np.median(times))))
    return fit_device(*np.array(rows).T)


def used_shares(active: Active, windows: int) -> Float[np.ndarray, " windows"]:
    """Mean share of the neurons that some of `k` successive tokens use, for `k` from 1 to `windows`.

    What a cache of window `k` holds; its difference from `k` to `k + 1` is what a token reads. The aggregated sparsity
    of `effjax.sparsity.reuse` is 1 less this, over the first tokens alone.

    Args:
        active: neurons that each token uses.

    Raises:
        ConfigError: fewer tokens than that.

    Example:
        >>> used_shares(np.array([[[1, 0], [1, 0], [0, 1]]], bool), 2).tolist()
        [0.5, 0.75]
    """
    tokens = active.shape[-2]
    if not 1 <= windows <= tokens:
        raise ConfigError(f"used_shares: windows={windows} of {tokens} tokens")
    union, shares = active, [active.mean()]
    for k in range(1, windows):
        union = union[..., :-1, :] | active[..., k:, :]
        shares.append(union.mean())
    return np.array(shares)


def independent_shares(active: Active, windows: int) -> Float[np.ndarray, " windows"]:
    """What `used_shares` would be if each neuron fired at its own rate and tokens knew nothing of each other.

    Example:
        >>> independent_shares(np.array([[[1, 0], [0, 0]]], bool), 2).tolist()
        [0.25, 0.375]
    """
    rates = active.mean(-2)
    return np.array([(1 - (1 - rates) ** k).mean() for k in range(1, windows + 1)])


def most_resident(active: Active, window: int) -> tuple[int, ...]:
    """For every layer the most neurons that some `window` successive tokens use: the rows that its cache needs.

    Example:
        >>> most_resident(np.array([[[1, 0], [1, 0], [0, 1]]], bool), 2)
        (2,)
    """
    union = active
    for k in range(1, min(window, active.shape[-2])):
        union = union[..., :-1, :] | active[..., k:, :]
    return tuple(int(n) for n in union.sum(-1).max(-1))


def largest_window(active: Active, rows: int, *, most: int = 64) -> int:
    """The largest window whose neurons fit into so many rows, of all layers together; 0 where none does.

    Args:
        active: neurons that each token of a text used.
        rows: for all caches, as the memory that is left over gives them.
        most: no larger one is tried.

    Example:
        >>> largest_window(np.array([[[1, 0], [1, 0], [0, 1]]], bool), rows=1)
        1
    """
    found = 0
    for window in range(1, min(most, active.shape[-2]) + 1):
        if sum(most_resident(active, window)) > rows:
            break
        found = window
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one token, without those of a cold start.

    Attributes:
        requests, bytes: that are read.
        seconds: of reading.
        resident: bytes of the model in memory.
    """

    requests: float
    bytes: float
    seconds: float
    resident: float


def io_table(
    active: Active, layout: Layout, device: Device, *, window: int, other: float, block: int = 1
) -> dict[str, Estimate]:
    """Reading a token's weights, idea by idea: the paper's table 2, with this model's neurons on this device.

    Args:
        active: neurons that each token of a text uses, predicted ones.
        layout: of the bundles; its block is not counted, `block` is.
        device: that they are read from.
        window: in tokens.
        other: bytes of all weights that are no neurons.
        block: parts, or bundles, are padded to a multiple of it.

    Returns:
        "naive": the whole model is read for every token. "hybrid": half of it is in memory, and the other half is read.
        "predictor": all but the neurons is in memory, and predicted neurons are read, each part by itself. "windowing":
        those of the last tokens stay. "bundling": a neuron's parts are read at once.
    """
    layers, _, neurons = active.shape
    parts = len(layout.parts)
    all_neurons = layers * neurons * parts * layout.part_bytes
    whole = all_neurons + other
    shares = used_shares(active, window + 1)
    used, new = (share * layers * neurons for share in (shares[0], shares[window] - shares[window - 1]))
    held = other + shares[window - 1] * all_neurons

    def padded(size: int) -> int:
        return -(-size // block) * block

    def estimate(requests: float, size: float, resident: float) -> Estimate:
        seconds = device.seconds(requests=requests, bytes=size, calls=layers)
        return Estimate(requests=requests, bytes=size, seconds=seconds, resident=resident)

    return {
        "naive": estimate(whole / MOST, whole, 0),
        "hybrid": estimate(whole / 2 / MOST, whole / 2, whole / 2),
        "predictor": estimate(used * parts, used * parts * padded(layout.part_bytes), other),
        "windowing": estimate(new * parts, new * parts * padded(layout.part_bytes), held),
        "bundling": estimate(new, new * padded(parts * layout.part_bytes), held),
    }


def predict_reads(active: Active, file: BundleFile, device: Device, *, window: int, align: int = 512) -> Estimate:
    """Reads of `FlashDecoder` for a text like this one: neighbouring neurons share requests, rows are padded.

    Args:
        active: neurons that each token of a text uses, predicted ones; not necessarily of the text that is to come.
        file: that is to be read.
        device: that holds it, as `measure_device` finds it.
        window: in tokens.
        align: of the reader.
    """
    layers, tokens, neurons = active.shape
    if tokens <= window:
        raise ConfigError(f"predict_reads: {tokens} tokens tell nothing of a window of {window}; give more")
    union = np.zeros_like(active[:, window:])
    for k in range(window):
        union |= active[:, k : tokens - window + k]
    new = active[:, window:] & ~union
    follows = np.zeros_like(new)
    follows[..., 1:] = new[..., 1:] & new[..., :-1]
    count = tokens - window
    loaded, requests = new.sum() / count, (new & ~follows).sum() / count
    stride = file.layout.stride
    around = 0 if stride % align == 0 else align
    size = loaded * stride + requests * around
    calls = new.any(-1).sum() / count
    held = sum(most_resident(active, window)) * stride
    return Estimate(
        requests=requests,
        bytes=size,
        seconds=device.seconds(requests=requests, bytes=size, calls=calls),
        resident=held,
    )
