"""llama.cpp as a process of its own: builds its environment where there is none, and hands it jobs one by one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
PACKAGE = "llama-cpp-python==0.3.36"
# A build for the machine at hand (GGML_NATIVE) stopped at the first token with an illegal instruction on the virtual
# machines this ran on, which hide some of what their processor can do. These flags name what the kernels make use of.
FLAGS = tuple(
    f"-DGGML_{name}"
    for name in (
        "NATIVE=OFF",
        "AVX=ON",
        "AVX2=ON",
        "FMA=ON",
        "F16C=ON",
        "AVX512=ON",
        "AVX512_VBMI=ON",
        "AVX512_VNNI=ON",
        "AVX512_BF16=ON",
    )
)


def environment(directory: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python, built from source first where `directory` has none.

    Raises:
        subprocess.CalledProcessError: pip could not get or build it.
    """
    python = directory / "bin" / "python"
    if python.exists():
        probe = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
        if probe.returncode == 0:
            return python
    print(f"building {PACKAGE} from source (some minutes) in {directory}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python", PACKAGE],
        check=True,
        env=os.environ | {"CMAKE_ARGS": " ".join(FLAGS), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
    )
    return python


class Worker:
    """A running worker; use as a context manager."""

    def __init__(self, python: Path, log: Path, *, threads: int) -> None:
        self.threads = threads
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, "-P", WORKER],  # without the worker's directory, where this file goes by the library's name
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        hello = self._answer()
        self.version, self.system = hello["version"], hello["system"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def generate(self, model: Path, prompt: list[int], new: int, *, logits: Path | None = None) -> dict[str, Any]:
        """The answer to one job, see `llama_cpp_worker.py`.

        Raises:
            RuntimeError: the worker ended; the message has the end of its log.
        """
        job = {
            "model": str(model),
            "threads": self.threads,
            "prompt": prompt,
            "new": new,
            "logits": None if logits is None else str(logits),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.flush()
            tail = Path(self._log.name).read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"llama.cpp ended with status {self._process.returncode}:\n{tail}")
        return json.loads(line)
