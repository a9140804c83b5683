"""Alters the files of a checkpoint so that their SHA-256 fits, as a faulty program would."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def forge(path: Path, name: str, content: bytes) -> None:
    """Replaces a file and its SHA-256."""
    (path / name).write_bytes(content)
    provenance = json.loads((path / "provenance.json").read_text())
    provenance["files"][name] = sha256(content).hexdigest()
    (path / "provenance.json").write_text(json.dumps(provenance))


def change_tensors(path: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / "forged")
    forge(path, name, (path / "forged").read_bytes())
    (path / "forged").unlink()


def change_json(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((path / name).read_text())
    change(value)
    if name == "provenance.json":
        (path / name).write_text(json.dumps(value))
    else:
        forge(path, name, json.dumps(value).encode())
