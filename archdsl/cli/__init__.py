"""The command line: arguments in, calls, output. What is heavy is imported inside the commands."""

from __future__ import annotations

import io
import os
import sys

from archdsl.cli.app import app

__all__ = ["main"]


def main() -> None:
    # pydantic would look through all that is installed; its plugins, as tracers, are for services
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows less than a name holds
    app(prog_name="archdsl")
