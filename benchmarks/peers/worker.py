"""A peer in a process and an environment of its own: one job a line goes in, one line of JSON comes back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self


class Worker:
    """A running script that says hello once and then answers jobs; use as a context manager.

    Attributes:
        hello: its first line.
    """

    def __init__(self, name: str, command: list[str | Path], log: Path) -> None:
        self._name, self._log = name, log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.hello = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to one job.

        Raises:
            RuntimeError: the worker ended; the message has the end of its log.
        """
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
            raise RuntimeError(f"{self._name} ended with status {self._process.returncode}:\n{tail}")
        return json.loads(line)


def environment(directory: Path, requirements: Path, name: str) -> Path:
    """The interpreter of an environment with pinned packages, made first where `directory` has none.

    Raises:
        subprocess.CalledProcessError: pip could not install them.
    """
    python, done = directory / "bin" / "python", directory / "requirements.txt"
    wanted = requirements.read_text(encoding="utf-8")
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making the environment of {name} (about 1.5 GB) in {directory}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: where a build for the processor is at hand, the rest then takes it as it is.
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, "--requirement", requirements], check=True)
    done.write_text(wanted, encoding="utf-8")
    return python
