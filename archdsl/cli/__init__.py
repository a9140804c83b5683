"""The command line: arguments in, calls, output. What is heavy is imported inside the commands."""

from __future__ import annotations

import io
import sys

from archdsl.cli.app import app

__all__ = ["main"]


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows less than a name holds
    app(prog_name="archdsl")
