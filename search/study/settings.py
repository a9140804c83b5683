"""The folder of a search: whose it is, and what decides what it holds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archdsl.errors import ArchdslError
from archdsl.files import write_text
from archdsl.lang.source import Tree
from archdsl.lang.spec import Budget
from archdsl.search.trials.proxy import Proxy


@dataclass(frozen=True)
class Settings:
    """All that decides what a search finds, but for how much of it is done.

    ``axes``: what should be low. ``strategy``: how draws are scored. ``window``: see ``Study``.
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
        """The space's name and a few digits that are others for other settings."""
        text = json.dumps(self.as_json(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        value = self.tree.value
        name = value.get("name", "search") if isinstance(value, dict) else "search"
        return f"{name}-{digest[:8]}"


def claim_folder(folder: Path, settings: Settings) -> None:
    """Takes the folder for these settings, which are those it was made for if it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    made_by = json.dumps({"name": settings.name, **settings.as_json()}, indent=1, sort_keys=True)
    if not file.exists():
        write_text(file, made_by)
    elif file.read_text() != made_by:
        raise ArchdslError(
            f"{folder} holds a search with other settings (see {file}); "
            "choose another --out, or delete it"
        )
