"""Memory of this process: what it holds, what it may hold, and what a compiled program will take."""

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from effjax.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_STATUS = Path("/proc/self/status")


def parse_bytes(text: str) -> int:
    """A size such as "2GiB", "900 MB" or "1.5g".

    Raises:
        ConfigError: anything else.

    Example:
        >>> parse_bytes("2GiB"), parse_bytes("1.5 MB")
        (2147483648, 1500000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is no size: write a number and a unit, such as 2GiB or 900MB")
    return int(float(match[1]) * _UNITS[match[2]])


def resident() -> int:
    """Bytes of memory that this process holds now; at most those it ever held, where the system does not tell."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    return _status("VmHWM")


def _status(field: str) -> int:
    if _STATUS.exists():
        match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if match:
            return 1024 * int(match[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library would keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_large_blocks_at_once() -> None:
    """Tells glibc to map every block above 1 MiB on its own, so that it is given back when it is freed.

    By itself glibc raises that bound to 32 MiB after the first large block, and then keeps the rest in its heap, where
    one small living block holds back all that is freed below it. For the whole process: a command may call it, a
    library function should not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**20)  # M_TRIM_THRESHOLD


def program_bytes(fn: Callable[..., Any], *args: Any) -> tuple[int, int, int]:
    """Bytes of arguments, of results, and of everything between, of `fn` compiled for these shapes."""
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    if analysis is None:
        return 0, 0, 0
    return analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes
