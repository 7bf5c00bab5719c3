"""Finds, checks and registers the compiled library, once a process and only when a kernel is asked for."""

import ctypes
import json
import pathlib
import re
import threading
import warnings

import jax

from kernels_cpu._build import LIBRARY_NAME, RECORD_NAME

# C++ handler symbol of each kernel; the FFI target has the same name.
HANDLERS = (
    "EffjaxPopcount",
    "EffjaxQuantMatmul",
    "EffjaxCodebookMatmul",
    "EffjaxNmMatmul",
    "EffjaxNomadLookup",
    "EffjaxNomadAttend",
    "EffjaxDecodeAttention",
    "EffjaxRepresenter",
    "EffjaxLabelTopK",
    "EffjaxSparseMlp",
    "EffjaxChooseNeurons",
)
# Functions that are called directly, without XLA.
FUNCTIONS = ("EffjaxPoolNew", "EffjaxPoolDelete", "EffjaxReadRows", "EffjaxBundleMlp")


class NativeKernelWarning(UserWarning):
    """Given once when a native kernel was asked for and the plain implementation runs in its place."""


class NativeLibrary:
    """The library of one directory, with the reason when it cannot be used.

    Every method may be called from several threads; nothing is read from disk before the first call.

    Args:
        directory: where the library and the record of its build lie.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._loaded: ctypes.CDLL | None = None
        self._reason: str | None = None  # None until the first try; "" once loaded
        self._registered: set[str] = set()
        self._warned = False

    def load(self) -> ctypes.CDLL | None:
        """Loads and checks the library, the first time; None when that is not possible. Starts no jax backend."""
        with self._lock:
            if self._reason is None:
                self._loaded, self._reason = self._try_to_load()
            return self._loaded

    def target(self, handler: str) -> str:
        """Registers a handler with XLA, the first time, and returns the name that `jax.ffi.ffi_call` takes.

        Done at the first call of a kernel and not at loading: XLA keeps a registration for good, and one it refuses
        stops the whole CPU backend.

        Raises:
            RuntimeError: when there is no library.
        """
        library = self.load()
        if library is None:
            raise RuntimeError(f"the kernel {handler} needs the native library: {self.why_not()}")
        with self._lock:
            if handler not in self._registered:
                jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
                self._registered.add(handler)
        return handler

    def why_not(self) -> str:
        """Why there are no native kernels, with the remedy; empty when there are."""
        self.load()
        return self._reason or ""

    def features(self) -> tuple[str, ...]:
        """The vector features of this processor, in a fixed order; empty without the library."""
        library = self.load()
        if library is None:
            return ()
        return tuple(library.EffjaxCpuFeatures().decode("ascii").split(","))

    def warn_once(self, kernel: str) -> None:
        """Warns that `kernel` runs without its native code; silent after the first time, whatever the kernel."""
        reason = self.why_not()
        with self._lock:
            if self._warned:
                return
            self._warned = True
        message = f"kernels_cpu.{kernel} runs as plain jax, which is slower: {reason}"
        warnings.warn(message, NativeKernelWarning, stacklevel=3)

    def _try_to_load(self) -> tuple[ctypes.CDLL | None, str]:
        path = self._directory / LIBRARY_NAME
        if not path.exists():
            return None, self._missing_reason()
        try:
            library = ctypes.CDLL(str(path))
            library.EffjaxCpuFeatures.restype = ctypes.c_char_p
            library.EffjaxFfiApiVersion.restype = ctypes.c_int32
            for name in (*HANDLERS, *FUNCTIONS):
                getattr(library, name)  # a library older than its Python side lacks one
        except (OSError, AttributeError) as error:
            return None, f"the native library cannot be loaded ({error}); install effjax again to rebuild it"
        mismatch = _version_mismatch(divmod(library.EffjaxFfiApiVersion(), 65536), _running_ffi_version())
        if mismatch:
            return None, mismatch
        return library, ""

    def _missing_reason(self) -> str:
        try:
            record = json.loads((self._directory / RECORD_NAME).read_text(encoding="utf-8"))
            message = str(record["message"])
        except (OSError, ValueError, KeyError, TypeError):
            return "the native library was never built; install effjax with a C++17 compiler at hand"
        return f"{message}; install a C++17 compiler and install effjax again"


# The library built with this package. Holds nothing until a kernel is asked for.
NATIVE = NativeLibrary(pathlib.Path(__file__).parent)


def _running_ffi_version() -> tuple[int, int] | None:
    """The FFI version of the installed jaxlib, read from the header it ships; None when that is absent."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    if not header.is_file():
        return None
    text = header.read_text(encoding="utf-8", errors="replace")
    found = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text, flags=re.MULTILINE))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None


def _version_mismatch(built: tuple[int, int], running: tuple[int, int] | None) -> str:
    """Why a library built for one FFI version cannot run under another; XLA keeps older minor versions alive."""
    if running is None or (built[0] == running[0] and built[1] <= running[1]):
        return ""
    return (
        f"the native library was built for FFI version {built[0]}.{built[1]}, and the installed jaxlib has "
        f"{running[0]}.{running[1]}; install effjax again to rebuild it"
    )
