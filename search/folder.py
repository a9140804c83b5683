"""The folder of a search: whose it is, and how much time has been spent in it."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from archdsl.errors import ArchdslError
from archdsl.files import write_text
from archdsl.search.proxy import Proxy
from archdsl.source import Tree
from archdsl.spec import Budget


def settings(tree: Tree, budget: Budget, proxy: Proxy, seed: int) -> str:
    """All that decides what a search does, as JSON."""
    value = {
        "space": tree.value,
        "budget": budget.model_dump(mode="json"),
        "proxy": proxy.model_dump(mode="json"),
        "data": {name: task.load().fingerprint for name, task in proxy.tasks.items()},
        "seed": seed,
    }
    return json.dumps(value, indent=1, sort_keys=True)


def run_name(tree: Tree, budget: Budget, proxy: Proxy, seed: int) -> str:
    """The space's name and a few digits that are others for other settings."""
    digest = hashlib.sha256(settings(tree, budget, proxy, seed).encode()).hexdigest()
    name = tree.value.get("name", "search") if isinstance(tree.value, dict) else "search"
    return f"{name}-{digest[:8]}"


def claim(folder: Path, made_by: str) -> None:
    """Takes the folder for these settings, which are those it was made for if it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        write_text(file, made_by)
    elif file.read_text() != made_by:
        raise ArchdslError(
            f"{folder} holds a search with other settings (see {file}); "
            "choose another --out, or delete it"
        )


class Clock:
    """Time spent on a search by all the processes that ever ran it."""

    def __init__(self, file: Path, limit: float | None) -> None:
        self.file, self.limit = file, limit
        self.before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0
        self.started = time.monotonic()

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def left(self) -> float:
        return float("inf") if self.limit is None else self.limit - self.spent

    def save(self) -> None:
        write_text(self.file, json.dumps({"seconds": round(self.spent, 1)}))
