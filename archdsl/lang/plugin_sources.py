"""Which source the blocks of plugins in a spec have: a stored result belongs to that source."""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path

from archdsl.lang.spec import ModelSpec, walk


def plugin_digests(spec: ModelSpec) -> dict[str, dict[str, str]]:
    """SHA-256 of the source of each plugin that ``spec`` has blocks of, under the key ``plugins``.

    Empty for a spec that is made of blocks of archdsl alone.
    """
    packages = {type(part).__module__.partition(".")[0] for _, part in walk(spec)} - {"archdsl"}
    digests = {package: _digest(package) for package in sorted(packages)}
    return {"plugins": digests} if digests else {}


@cache
def _digest(package: str) -> str:
    """Of all Python files of a package, or of the one file of a module."""
    there = sys.modules[package]
    files = [one for folder in getattr(there, "__path__", ()) for one in Path(folder).rglob("*.py")]
    file = getattr(there, "__file__", None)  # a notebook has none
    if not files and file:
        files = [Path(file)]
    whole = hashlib.sha256()
    for one in sorted(files):
        whole.update(one.read_bytes() + b"\0")
    return whole.hexdigest()
