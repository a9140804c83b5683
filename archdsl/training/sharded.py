"""Write the checkpoints of several processes in the background, while the training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from archdsl.errors import ArchdslError
from archdsl.files import disk_fault, writing
from archdsl.model.checkpoint import CheckpointError
from archdsl.model.shards import write_shards
from archdsl.nn.ranks import WAIT, Ranks


class ShardWriter:
    """Writes one checkpoint at a time. All processes call the same methods."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.group = dist.new_group(backend="gloo", timeout=WAIT)
        self.thread = ThreadPoolExecutor(1)
        self.running: Future[Any] | None = None
        self.path = Path()

    def write(
        self, path: Path, tensors: Mapping[str, Tensor], finish: Callable[[Path], None]
    ) -> None:
        """Begin to write the tensors to a folder, which the first process then gives to ``finish``.

        Their values are copied first, so that they may change. ``path``: what the checkpoint will
        be called. Raises CheckpointError if the one before could not be written.
        """
        self.wait()
        self.path, folder = path, path.with_name(f".{path.name}.shards.tmp")
        self.ranks.on_first(lambda: _make_empty(folder))
        written = write_shards(tensors, folder, self.group)

        def complete() -> None:
            written.result()
            if self.ranks.first:  # whose part is done when all are
                finish(folder)

        self.running = self.thread.submit(complete)

    def wait(self) -> None:
        """Wait until the checkpoint is written. Raises CheckpointError if it cannot be."""
        if self.running is not None:
            running, self.running = self.running, None
            self.ranks.agree(lambda: result_of(running, self.path))

    def close(self) -> None:
        """Wait for a checkpoint that is being written, whether or not it can be."""
        self.thread.shutdown()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir(parents=True)


def result_of(running: Future[Any], path: Path) -> None:
    """Wait for the end of a write. Raises CheckpointError, which says why, if it failed."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        running.result()
    except ArchdslError:
        raise
    except (Exception, CheckpointException) as error:  # the second one is no Exception
        failures = getattr(error, "failures", {}).values()  # of each process, by DCP
        causes = [error, *(cause for cause, *_ in failures)]
        reasons = [reason for cause in causes if (reason := disk_fault(cause))]
        why = reasons[0] if reasons else f"{type(causes[-1]).__name__}: {causes[-1]}"
        raise CheckpointError(f"{path} could not be written: {why}") from error
