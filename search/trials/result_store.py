"""Where the scores and states of jobs lie, under a name made of all that decides them.

    made_by.json        what that is
    step-000100.json    the score after so many steps
    state/              the furthest training stood: a checkpoint
    lock                held while one process trains

Any number of processes, studies and machines may share the folder above.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from archdsl.files import write_text

SECONDS_BETWEEN_TRIES = 0.1  # seconds; a file lock can be waited for only in silence


@dataclass(frozen=True)
class StoredRun:
    """The folder of one training run, of whatever length."""

    root: Path
    identity: Mapping[str, Any]  # JSON values
    description: Mapping[str, Any]  # for people; what made the folder first

    @cached_property
    def folder(self) -> Path:
        text = json.dumps(self.identity, sort_keys=True)
        return self.root / hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def score(self, steps: int) -> Path:
        """The file that holds the score once there is one."""
        return self.folder / f"step-{steps:06d}.json"

    @property
    def in_use(self) -> bool:
        """Whether a process is training here at this moment."""
        if not (self.folder / "lock").exists():
            return False
        with (self.folder / "lock").open("a") as file:
            return not _try_lock(file.fileno())

    @contextmanager
    def locked(self, heartbeat: Callable[[], None]) -> Iterator[None]:
        """One process at a time; the others wait, and beat. Whoever dies gives way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            while not _try_lock(file.fileno()):
                heartbeat()
                time.sleep(SECONDS_BETWEEN_TRIES)
            made_by = self.folder / "made_by.json"
            if not made_by.exists():
                write_text(made_by, json.dumps({**self.description, **self.identity}, indent=1))
            yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
