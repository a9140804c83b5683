"""The settings of a search, and the check that a folder belongs to these settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archdsl.errors import ArchdslError
from archdsl.files import make_folder, read_bytes, write_text
from archdsl.lang.source import Tree
from archdsl.lang.spec import Budget
from archdsl.search.trials.proxy import Proxy

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a search finds, except how long it runs.

    ``axes``: the names of the objectives, the loss first. ``strategy``: how trials are scored.
    ``layouts``: the number of supernets of the strategy ``shared``. ``window``: see ``Study``.
    """

    tree: Tree
    budget: Budget
    proxy: Proxy
    axes: tuple[str, ...] = ("loss", "flops")
    strategy: str = "separate"
    layouts: int = 4
    window: int = 8
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, which also contain the fingerprint of the data.

        Raises DataError if the data of a task cannot be loaded.
        """
        return {
            "space": self.tree.value,
            "budget": self.budget.model_dump(mode="json", exclude={"train_flops"}),
            "proxy": self.proxy.model_dump(mode="json"),
            "data": {name: task.load().fingerprint for name, task in self.proxy.tasks.items()},
            "objective": list(self.axes),
            "strategy": self.strategy,
            "window": self.window,
            "seed": self.seed,
            **({"layouts": self.layouts} if self.strategy == "shared" else {}),
        }

    @property
    def name(self) -> str:
        """The name of the study: the space's name and the first digits of the settings' hash."""
        text = json.dumps(self.as_json(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        value = self.tree.value
        name = value.get("name", "search") if isinstance(value, dict) else "search"
        return f"{name}-{digest[:8]}"


def was_begun(folder: Path, settings: Settings) -> bool:
    """Whether the folder holds a search with these settings.

    Raises ArchdslError if its settings cannot be read.
    """
    file = folder / SETTINGS
    return file.exists() and read_bytes(file, ArchdslError) == _as_written(settings).encode()


def claim_folder(folder: Path, settings: Settings) -> None:
    """Create the folder for these settings, or check that it was created for them.

    Raises ArchdslError if it holds a search with other settings, or cannot be created.
    """
    make_folder(folder)
    file = folder / SETTINGS
    if not file.exists():
        write_text(file, _as_written(settings))
    elif not was_begun(folder, settings):
        raise ArchdslError(
            f"{folder} holds a search with other settings (see {file}); "
            "choose another --out, or delete the folder"
        )


def _as_written(settings: Settings) -> str:
    return json.dumps({"name": settings.name, **settings.as_json()}, indent=1, sort_keys=True)
