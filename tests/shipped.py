"""The shipped specs that differ in more than their size, for tests that are long for each."""

from __future__ import annotations

from archdsl.lang.source import shipped_specs

_ALL = shipped_specs()
# of a model with a small twin, NAME-tiny, the twin
STRUCTURES = [
    name for name in _ALL if not name.endswith(("230m", "466m")) and f"{name}-tiny" not in _ALL
]
