"""The command line: `effjax plan · compress · convert · verify · eval · generate · calibrate-kv · report`."""

import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from effjax.cli.calibrate_kv import CalibrateKV
from effjax.cli.compress import Compress
from effjax.cli.console import complain
from effjax.cli.convert import Convert
from effjax.cli.evaluate import Evaluate
from effjax.cli.generate import Generate
from effjax.cli.plan import PlanCommand
from effjax.cli.report import Report
from effjax.cli.verify import Verify
from effjax.errors import EffjaxError

Command = (
    Annotated[
        PlanCommand,
        tyro.conf.subcommand("plan", description="Says what compression will give, from config.json alone."),
    ]
    | Annotated[Compress, tyro.conf.subcommand("compress", description="Compresses a model and shows what it cost.")]
    | Annotated[
        Convert, tyro.conf.subcommand("convert", description="Writes a model in another file format, exactly or not.")
    ]
    | Annotated[Verify, tyro.conf.subcommand("verify", description="Looks for damage in a model directory.")]
    | Annotated[
        Evaluate, tyro.conf.subcommand("eval", description="Judges a model, a compressed one against its original.")
    ]
    | Annotated[Generate, tyro.conf.subcommand("generate", description="Continues a text.")]
    | Annotated[
        CalibrateKV,
        tyro.conf.subcommand("calibrate-kv", description="Learns how the cache of a model is held as codes."),
    ]
    | Annotated[Report, tyro.conf.subcommand("report", description="Writes the report for models compressed before.")]
)
_DESCRIPTION = """Makes language models smaller, and shows what that cost.

`effjax compress` without arguments compresses the embedded model in six ways and writes them with a report.

A MODEL is a directory (Hugging Face layout, quantized or not, or written by effjax), a .gguf file, a hub id such as
Qwen/Qwen2.5-0.5B, or "default" for the embedded one. Errors are one line; --debug shows where they come from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code: 0 done; 1 a check failed (findings of `verify`, `eval --require`); 2 a mistake in the arguments,
        the input or the disk, told in one line on stderr; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        command: Any = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="effjax",
            description=_DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except SystemExit as stop:  # help was shown, or tyro has told what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _terminated_like_interrupted():
            return command.run()
    except (EffjaxError, OSError) as error:
        if debug:
            raise
        complain(error)
        return 2
    except KeyboardInterrupt as interrupt:  # a command that keeps finished work says so in the exception
        if debug:
            raise
        complain(str(interrupt) or "interrupted; nothing unfinished was left behind")
        return 130


class _terminated_like_interrupted:
    """Lets SIGTERM clean up as Ctrl-C does, where signals can be handled at all (the main thread).

    An interrupt that falls into a finalizer or a callback of the garbage collector (jax has one) cannot be raised from
    there: Python prints it and goes on. It is therefore sent again a moment later, so none is lost.
    """

    def __enter__(self) -> None:
        self.previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, _interrupt)
            self.previous_hook = sys.unraisablehook
            sys.unraisablehook = self._send_again

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
            sys.unraisablehook = self.previous_hook

    def _send_again(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Not from here: what is raised inside this hook would be lost as well. To the thread, which may wait.
            threading.Timer(0.01, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM)).start()
        else:
            self.previous_hook(unraisable)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
