"""llama.cpp as a process of its own: builds its environment where there is none, and hands it jobs one by one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import worker

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


class Worker(worker.Worker):
    """A running llama.cpp."""

    def __init__(self, python: Path, log: Path, *, threads: int) -> None:
        # Without the worker's directory, where this file goes by the library's name.
        super().__init__("llama.cpp", [python, "-P", WORKER], log)
        self.threads, self.version, self.system = threads, self.hello["version"], self.hello["system"]

    def generate(self, model: Path, prompt: list[int], new: int, *, logits: Path | None = None) -> dict[str, Any]:
        """The answer to one job, see `llama_cpp_worker.py` and `worker.Worker.ask`."""
        job = {
            "model": str(model),
            "threads": self.threads,
            "prompt": prompt,
            "new": new,
            "logits": None if logits is None else str(logits),
        }
        return self.ask(job)
