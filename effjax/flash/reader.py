"""Rows of a file, by number, into memory: past the page cache, many requests at once, neighbours in one request."""

import concurrent.futures
import dataclasses
import errno
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Int, Int64, UInt8

from effjax.errors import CheckpointError, ConfigError
from kernels_cpu import read_rows
from kernels_cpu._native import NATIVE

Requests = Int64[np.ndarray, "r 4"]  # offset and length in the file, first piece, pieces
Pieces = Int64[np.ndarray, "p 3"]  # offset in its request, offset in the buffer, length
MOST = 1 << 20  # bytes of a request: larger ones gain nothing, and threads have less to share
UNITS = (512, 4096)  # what direct reads are aligned to, by device


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadCount:
    """What reads took: requests to the system, and bytes with all that was read around the rows.

    Example:
        >>> ReadCount(requests=1, bytes=512) + ReadCount(requests=2, bytes=1024)
        ReadCount(requests=3, bytes=1536)
    """

    requests: int = 0
    bytes: int = 0

    def __add__(self, other: "ReadCount") -> "ReadCount":
        return ReadCount(requests=self.requests + other.requests, bytes=self.bytes + other.bytes)


def plan_requests(
    ids: Int[np.ndarray, " n"],
    slots: Int[np.ndarray, " n"],
    *,
    start: int,
    stride: int,
    align: int = 1,
    gap: int = 0,
    most: int = MOST,
) -> tuple[Requests, Pieces]:
    """The requests that fetch some rows: one for each run of rows that follow each other in the file.

    Args:
        ids: rows, in any order, repeated or not.
        slots: where each goes: row `slots[i]` of a buffer whose rows are `stride` bytes.
        start: byte of row 0 in the file.
        stride: bytes of a row.
        align: requests begin and end at multiples of this.
        gap: rows between two wanted ones that are read too, to save a request.
        most: bytes of a request, but for the alignment; one row at least.

    Example:
        >>> requests, pieces = plan_requests(np.array([7, 2, 3]), np.array([0, 1, 2]), start=4096, stride=512)
        >>> requests.tolist()
        [[5120, 1024, 0, 2], [7680, 512, 2, 1]]
        >>> pieces.tolist()
        [[0, 512, 512], [512, 1024, 512], [0, 0, 512]]
    """
    order = np.argsort(ids, kind="stable")
    ids, slots = np.asarray(ids, np.int64)[order], np.asarray(slots, np.int64)[order]
    if not len(ids):
        return np.zeros((0, 4), np.int64), np.zeros((0, 3), np.int64)
    begins = np.diff(ids, prepend=ids[0] - gap - 2) > gap + 1
    from_first = ids - ids[begins][np.cumsum(begins) - 1]
    within = from_first // max(1, most // stride)  # which part of a long run
    begins |= np.diff(within, prepend=within[0]) != 0
    first = np.flatnonzero(begins)
    count = np.diff(first, append=len(ids))
    offset = start + ids[first] * stride
    end = start + (ids[first + count - 1] + 1) * stride
    offset, end = offset // align * align, -(-end // align) * align
    owner = np.cumsum(begins) - 1
    pieces = np.stack([start + ids * stride - offset[owner], slots * stride, np.full(len(ids), stride)], 1)
    return np.stack([offset, end - offset, first, count], 1), np.ascontiguousarray(pieces)


def aligned_empty(rows: int, stride: int) -> UInt8[np.ndarray, "rows stride"]:
    """Zeros that begin at a page, so that direct reads can go there; private memory of this process.

    Raises:
        MemoryError: the system gives no more.
    """
    if rows * stride == 0:
        return np.zeros((rows, stride), np.uint8)
    try:
        memory = mmap.mmap(-1, rows * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{rows * stride:,} bytes for {rows} rows: {error.strerror}") from error
    return np.frombuffer(memory, np.uint8).reshape(rows, stride)


class RowReader:
    """Reads rows of equal length by number. Rows may be anything: neurons, or pieces of an expert.

    May be used from several threads at once. Reads go past the page cache (O_DIRECT); where the file system refuses
    that, they are ordinary ones, after each of which the pages are dropped, and `direct` is False.

    Args:
        path: of the file.
        start: byte of row 0.
        stride: bytes of a row.
        rows: how many there are.
        threads: that read besides the caller.
        gap: rows between two wanted ones that are read too, to save a request.
        direct: False for ordinary reads.
        implementation: "cpu" is the native one, "python" needs no library; None takes the native one where it is built.

    Raises:
        CheckpointError: the file cannot be opened, or is too short for the rows.
        ConfigError: a size that is not positive, or an implementation that does not run here.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(bytes(range(40)))
        ...     file.flush()
        ...     with RowReader(file.name, start=0, stride=4, rows=10) as reader:
        ...         out = aligned_empty(3, 4)
        ...         count = reader.read(np.array([9, 0]), out, np.array([0, 2]))
        >>> out.tolist(), count.requests
        ([[36, 37, 38, 39], [0, 0, 0, 0], [0, 1, 2, 3]], 2)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        start: int,
        stride: int,
        rows: int,
        threads: int = 15,
        gap: int = 0,
        direct: bool = True,
        implementation: Literal["cpu", "python"] | None = None,
    ) -> None:
        self.path, self.start, self.stride, self.rows = Path(path), start, stride, rows
        self.threads, self.gap = threads, gap
        if min(stride, rows) < 1 or min(start, threads, gap) < 0:
            raise ConfigError(f"RowReader: stride={stride}, rows={rows}, threads={threads}, gap={gap}: too small")
        if implementation not in (None, "cpu", "python"):
            raise ConfigError(f"RowReader: implementation={implementation!r}: choose 'cpu' or 'python'")
        if implementation == "cpu" and NATIVE.load() is None:
            raise ConfigError(f"RowReader: implementation='cpu' does not run: {NATIVE.why_not()}")
        native = implementation != "python" and NATIVE.load() is not None
        self.pool = read_rows.Pool(threads) if native else None
        self._python = None if native else concurrent.futures.ThreadPoolExecutor(threads + 1)
        self._lock = threading.Lock()
        self._files: list[int] = []
        try:
            self._fd, self.align = _open(self.path, direct)
            self._files.append(self._fd)
            size = os.fstat(self._fd).st_size
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be opened for reading ({error.strerror})") from error
        if 0 < size < start + stride * rows:
            self.close()
            raise CheckpointError(
                f"{self.path} has {size:,} bytes, and {rows} rows of {stride} from byte {start} on need "
                f"{start + stride * rows:,}; copy or write it again"
            )

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self.align > 1

    def plan(self, ids: Int[np.ndarray, " n"], slots: Int[np.ndarray, " n"]) -> tuple[Requests, Pieces]:
        """See `plan_requests`."""
        return plan_requests(ids, slots, start=self.start, stride=self.stride, align=self.align, gap=self.gap)

    def read(
        self,
        ids: Int[np.ndarray, " n"],
        out: UInt8[np.ndarray, "slots stride"],
        slots: Int[np.ndarray, " n"] | None = None,
    ) -> ReadCount:
        """Puts row `ids[i]` at `out[slots[i]]`; at `out[i]` without slots.

        Raises:
            IndexError: a row or a slot that is not there; nothing was read.
            CheckpointError: the system cannot read, or the file was cut short meanwhile.
        """
        ids = np.asarray(ids)
        slots = np.arange(len(ids)) if slots is None else np.asarray(slots)
        for name, values, bound in (("row", ids, self.rows), ("slot", slots, len(out))):
            bad = values[(values < 0) | (values >= bound)]
            if len(bad):
                raise IndexError(f"{self.path}: {name} {bad[0]} of {bound}")
        if out.shape[1:] != (self.stride,) or len(slots) != len(ids):
            raise IndexError(
                f"{self.path}: out {list(out.shape)}, {len(slots)} slots for {len(ids)} rows of {self.stride}"
            )
        fd, align = self._fd, self.align
        requests, pieces = self.plan(ids, slots)
        if not len(requests):
            return ReadCount()
        try:
            self._run(fd, requests, pieces, out, align)
        except EOFError as error:
            raise CheckpointError(f"{self.path} ends before row {ids.max()}; copy or write it again") from error
        except OSError as error:
            if error.errno != errno.EINVAL or align == 1:
                raise CheckpointError(f"{self.path} cannot be read ({os.strerror(error.errno or 0)})") from error
            self._give_up_direct()  # opened, and refused only now
            return self.read(ids, out, slots)
        return ReadCount(requests=len(requests), bytes=int(requests[:, 1].sum()))

    def close(self) -> None:
        """Ends the threads and closes the file; done at the end of a `with`."""
        if self.pool is not None:
            self.pool.close()
        if self._python is not None:
            self._python.shutdown()
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _give_up_direct(self) -> None:
        with self._lock:
            if self.direct:  # the old descriptor stays open for other threads that read with it
                self._fd, self.align = _open(self.path, False)
                self._files.append(self._fd)

    def _run(self, fd: int, requests: Requests, pieces: Pieces, out: np.ndarray, align: int) -> None:
        if self.pool is not None:
            self.pool.read(fd, requests, pieces, out, align=align, drop=align == 1)
            return
        assert self._python is not None
        flat = memoryview(out.reshape(-1))  # type: ignore[arg-type]
        list(self._python.map(lambda request: _read_one(fd, request, pieces, flat, align), requests))


def _open(path: Path, direct: bool) -> tuple[int, int]:
    """A descriptor, and what reads with it are aligned to: 1 for ordinary ones."""
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    if flag:
        fd = None
        try:
            fd = os.open(path, os.O_RDONLY | flag)
            for align in UNITS:
                if _accepts(fd, align):
                    return fd, align
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        if fd is not None:
            os.close(fd)
    fd = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd, 1


def _accepts(fd: int, align: int) -> bool:
    """Whether a direct read may start and end at an odd multiple of `align`."""
    with mmap.mmap(-1, 4 * align) as memory, memoryview(memory) as view, view[align : 2 * align] as part:
        try:
            os.preadv(fd, [part], align)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
    return True


def _read_one(fd: int, request: np.ndarray, pieces: Pieces, out: memoryview, align: int) -> None:
    """One request without the native library: through memory of its own, to where its pieces belong."""
    offset, length, first, count = (int(n) for n in request)
    wanted = pieces[first : first + count]
    needed = int((wanted[:, 0] + wanted[:, 2]).max())
    with mmap.mmap(-1, length) as memory, memoryview(memory) as view:
        got = 0
        while got < needed:
            with view[got:] as rest:
                n = os.preadv(fd, [rest], offset + got)
            if n == 0 or (got + n < needed and n < align):
                raise EOFError(offset)
            got += n if got + n >= needed else n // align * align
        for start, to, size in wanted.tolist():
            out[to : to + size] = view[start : start + size]
    if align == 1 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
