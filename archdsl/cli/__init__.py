"""The command line: arguments in, calls, output. What is heavy is imported inside the commands."""

from __future__ import annotations

import io
import os
import sys

from archdsl.cli.app import app

__all__ = ["main"]


def let_idle_threads_sleep() -> None:
    """Before torch is imported. OpenMP's threads wait for each other by spinning, unless asked not
    to: beside another busy process a training would take ten times as long."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Runs the program: the entry point of ``archdsl`` and of ``python -m archdsl``."""
    let_idle_threads_sleep()
    # pydantic would look through all that is installed; its plugins, as tracers, are for services
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows less than a name holds
    app(prog_name="archdsl")
