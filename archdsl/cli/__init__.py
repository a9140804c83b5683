"""The command line: arguments in, calls, output. What is heavy is imported inside the commands."""

from __future__ import annotations

from archdsl.cli.app import app

__all__ = ["main"]


def main() -> None:
    app(prog_name="archdsl")
