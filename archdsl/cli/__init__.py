"""The command line: arguments in, calls, output. What is heavy is imported inside the commands."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def let_idle_threads_sleep() -> None:
    """Before torch is imported. OpenMP's threads wait for each other by spinning, unless asked not
    to: beside another busy process a training would take ten times as long."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def open_missing_streams() -> None:
    """Opens those of stdin, stdout and stderr that the program was started without, on nothing.

    Otherwise the next file to be opened would get the number of one of them, and what is printed
    would end in it.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)  # the lowest number that is free
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  for all of the program
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


@contextmanager
def interrupts_only_here() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt inside the block alone; before and after, it just ends.

    While modules are imported or the interpreter ends, there is nothing to save or to tidy up, and
    the exception would be printed with a traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:  # another one, while the first one was told
        sys.exit(INTERRUPTED)
    finally:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Runs the program: the entry point of ``archdsl`` and of ``python -m archdsl``."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # it may be ignored: nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    let_idle_threads_sleep()
    open_missing_streams()
    # pydantic would look through all that is installed; its plugins, as tracers, are for services
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows less than a name holds
    from archdsl.cli.app import app

    with interrupts_only_here():
        app(prog_name="archdsl")
