"""The result store: a folder of scores and training states that jobs write and reuse.

Each training run has its own folder. Its name is a hash of everything that decides the result:

    made_by.json        the values that were hashed
    step-000100.json    the score after 100 steps
    step-000100-on-8192.json  the same, on 8,192 held-out tokens instead of all
    state/              a checkpoint of the training after the most steps so far
    lock                a file that is locked while a process trains

Any number of processes, studies and machines may share one result store.
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

from archdsl.files import make_folder, refuse_no_file, write_text

SECONDS_BETWEEN_TRIES = 0.1  # a blocking wait for the file lock would send no heartbeats


@dataclass(frozen=True)
class StoredRun:
    """The folder of one training run in the result store; it serves any number of steps.

    ``root``: the folder of the result store. ``identity``: everything that decides the result.
    ``description``: names for human readers, from the job that created the folder.
    """

    root: Path
    identity: Mapping[str, Any]  # JSON values
    description: Mapping[str, Any]  # JSON values; not part of the hash

    @cached_property
    def folder(self) -> Path:
        """The folder of this run, which is named by the hash of ``identity``."""
        text = json.dumps(self.identity, sort_keys=True)
        return self.root / hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def state(self) -> Path:
        """The folder of the checkpoint; it need not exist."""
        return self.folder / "state"

    def score(self, steps: int, tokens: int | None = None) -> Path:
        """Return the path of the file for the score after ``steps``; it need not exist.

        ``tokens``: the number of held-out tokens of the score, if it is not that of the run.
        """
        fewer = f"-on-{tokens}" if tokens else ""
        return self.folder / f"step-{steps:06d}{fewer}.json"

    def is_scored(self, steps: int) -> bool:
        """Return whether there is a score after ``steps``, on any number of tokens."""
        return self.score(steps).exists() or any(self.folder.glob(f"step-{steps:06d}-on-*.json"))

    @property
    def in_use(self) -> bool:
        """Whether a process holds the lock of this run at present."""
        if not (self.folder / "lock").is_file():
            return False
        with (self.folder / "lock").open("a") as file:
            return not _try_lock(file.fileno())

    @contextmanager
    def locked(self, heartbeat: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of this run during the ``with`` block, and create the folder if needed.

        While another process holds the lock, this process waits and calls ``heartbeat``. The
        operating system releases the lock of a process that dies.
        """
        make_folder(self.folder)
        refuse_no_file(self.folder / "lock")
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
