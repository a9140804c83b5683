"""What a file of weights says of a tensor before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and its type as safetensors names it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
