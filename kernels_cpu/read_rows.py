"""Rows of a file into memory: requests that a pool of threads reads side by side, past the page cache."""

import ctypes
import errno
import weakref

import numpy as np
from jaxtyping import Int64, UInt8

from kernels_cpu._native import NATIVE

END_OF_FILE = -1  # kEndOfFile in read_rows.h


class Pool:
    """Threads that read; closed when it is no longer referenced.

    Args:
        threads: beside the caller's own, which reads too.

    Raises:
        RuntimeError: no native library, or no more threads.
    """

    def __init__(self, threads: int) -> None:
        library = NATIVE.load()
        if library is None:
            raise RuntimeError(f"read_rows needs the native library: {NATIVE.why_not()}")
        library.EffjaxPoolNew.restype = ctypes.c_void_p
        self._handle = library.EffjaxPoolNew(ctypes.c_int64(threads))
        if not self._handle:
            raise RuntimeError(f"the system gives no {threads} threads; ask for fewer")
        self.library = library
        self.close = weakref.finalize(self, library.EffjaxPoolDelete, ctypes.c_void_p(self._handle))

    @property
    def handle(self) -> ctypes.c_void_p:
        """For functions of the library that run on the pool."""
        return ctypes.c_void_p(self._handle)

    def read(
        self,
        fd: int,
        requests: Int64[np.ndarray, "r 4"],
        pieces: Int64[np.ndarray, "p 3"],
        out: UInt8[np.ndarray, "..."],
        *,
        align: int,
        drop: bool,
    ) -> None:
        """Reads all requests; returns when every piece is in place. Other Python threads run meanwhile.

        Args:
            fd: of the file, opened with O_DIRECT where `align` is above 1.
            requests: a row `(offset, length, first piece, pieces)` for each.
            pieces: a row `(offset in its request, offset in out, length)` for each.
            out: written to, C-contiguous.
            align: of offsets, lengths and addresses.
            drop: tells the system to forget the pages that were read.

        Raises:
            EOFError: the file ends before a wanted byte; the message is the offset of the request.
            OSError: what the system said.
        """
        for array in (requests, pieces):
            assert array.dtype == np.int64 and array.flags.c_contiguous, array.dtype
        assert out.flags.c_contiguous and out.flags.writeable
        where = ctypes.c_int64(-1)
        code = self.library.EffjaxReadRows(
            self.handle,
            ctypes.c_int32(fd),
            ctypes.c_void_p(requests.ctypes.data),
            ctypes.c_int64(len(requests)),
            ctypes.c_void_p(pieces.ctypes.data),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int64(align),
            ctypes.c_int64(drop),
            ctypes.byref(where),
        )
        if code == END_OF_FILE:
            raise EOFError(int(requests[where.value, 0]))
        if code:
            raise OSError(code, errno.errorcode.get(code, "unknown error"))
