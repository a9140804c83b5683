"""Where the figures of a training go: metrics.jsonl, and TensorBoard, W&B or trackio if asked.

A logger has two methods: ``log(step, figures)`` and ``close()``. The figures of a step are a
mapping of names to JSON values, which may be mappings, too. Loggers of other packages get the
numbers alone, by names such as ``validation/loss``.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from archdsl.errors import ArchdslError, blamed_on
from archdsl.files import JsonLines, make_folder, write_all, write_text, writing

PROJECT = "archdsl"  # at W&B and trackio
RUN_ID = "wandb-id.txt"  # by which W&B knows a run again


class Logger(Protocol):
    """What receives the figures of a training."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Record the figures of a step. Raises WriteError if they cannot be written."""

    def close(self) -> None:
        """Write what is left."""


class JsonLog:
    """A file with one JSON object per step; see `JsonLines`."""

    def __init__(self, path: Path, after_step: int) -> None:
        self.lines = JsonLines(path, after_step)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add a line."""
        self.lines.append({"step": step, **figures})

    def close(self) -> None:
        """Close the file."""
        self.lines.close()


class TensorBoardLog:
    """A file of events that TensorBoard shows: ``tensorboard --logdir runs``.

    The `SummaryWriter` of torch writes in a thread, where the error of a full disk would be printed
    with a traceback. This writes the same file at once.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        """Raises ArchdslError if tensorboard is missing, WriteError if nothing can be written."""
        _module("tensorboard")
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.events = event_pb2
        make_folder(folder)
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        with writing(self.path):
            self.file = self.path.open("wb", buffering=0)
            self.records = RecordWriter(self)
            self._write(file_version="brain.Event:2")
            # figures of later steps, which a run that was stopped has left, are hidden
            start = self.events.SessionLog(status=self.events.SessionLog.START)
            self._write(step=after_step + 1, session_log=start)

    def _write(self, **values: Any) -> None:
        event = self.events.Event(wall_time=time.time(), **values)
        self.records.write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        """Write a whole record; called by tensorboard."""
        write_all(self.file, record)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write the numbers as scalars."""
        scalars = [{"tag": name, "simple_value": number} for name, number in numbers(figures)]
        with writing(self.path):
            self._write(step=step, summary={"value": scalars})

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class RunLog:
    """A run of W&B or of trackio, which has the methods ``log(figures, step)`` and ``finish()``."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Send the numbers."""
        self.run.log(dict(numbers(figures)), step=step)

    def close(self) -> None:
        """Send what is left."""
        with redirect_stdout(sys.stderr):  # stdout has the results of the command alone
            self.run.finish()


def open_loggers(
    kinds: Sequence[str], out: Path | None, after_step: int, facts: Mapping[str, Any]
) -> list[Logger]:
    """Return the loggers of the given names, in addition to that of metrics.jsonl.

    ``out``: the folder of the run. ``after_step``: the step that the run goes on from.
    ``facts``: what W&B and trackio keep of the run. Raises ArchdslError if a package is missing or
    there is no folder, WriteError if nothing can be written there.
    """
    with blamed_on("log"):
        if kinds and out is None:
            raise ArchdslError(f"log: {kinds[0]} needs the folder of the run: give out")
        return [_opened(kind, out, after_step, facts) for kind in dict.fromkeys(kinds) if out]


def _opened(kind: str, out: Path, after_step: int, facts: Mapping[str, Any]) -> Logger:
    if kind == "tensorboard":
        return TensorBoardLog(out / "tensorboard", after_step)
    module = _module(kind)
    options: dict[str, Any] = {"name": out.absolute().name, "config": dict(facts)}
    if kind == "wandb":
        options |= {"dir": str(out), "id": _run_id(out / RUN_ID)}
    with redirect_stdout(sys.stderr):
        return RunLog(module.init(project=PROJECT, resume="allow", **options))


def _run_id(path: Path) -> str:
    """Return the name by which W&B knows the run, the same whenever it is resumed."""
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        fix = f"pip install 'archdsl[{name}]'"
        raise ArchdslError(f"log: {name} is not installed: {fix}") from None


def numbers(figures: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of figures with their names, as ``validation/loss``.

    The numbers of a list have the names 1, 2, ... below its name.
    """
    for name, value in figures.items():
        if isinstance(value, list | tuple):
            value = {str(place): item for place, item in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from numbers(value, f"{above}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield above + name, value
