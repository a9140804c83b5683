"""Works that end in every way there is. Imports little, as children import it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

Heartbeat = Callable[[], None]
KEPT: list[bytearray] = []


@dataclass(frozen=True)
class Whole:
    """Cannot be halved."""

    def smaller(self) -> Self | None:
        return None


@dataclass(frozen=True)
class Raises(Whole):
    error: BaseException

    def run(self, heartbeat: Heartbeat) -> None:
        raise self.error


@dataclass(frozen=True)
class Aborts(Whole):
    def run(self, heartbeat: Heartbeat) -> None:
        os.abort()


@dataclass(frozen=True)
class Leaves(Whole):
    status: int

    def run(self, heartbeat: Heartbeat) -> None:
        os._exit(self.status)


@dataclass(frozen=True)
class Sleeps(Whole):
    """Notes who it is and when it was there, in a file of its own."""

    note: Path
    seconds: float
    heartbeats: bool = True

    def run(self, heartbeat: Heartbeat) -> int:
        started = time.monotonic()
        self.note.write_text(f"{os.getpid()} {os.getppid()} {started}")
        while time.monotonic() < started + self.seconds:
            time.sleep(0.02)
            if self.heartbeats:
                heartbeat()
        return os.getpid()


@dataclass(frozen=True)
class Killed:
    """By the kernel, as it seems, as long as it is larger than ``fits``."""

    size: int
    fits: int

    def run(self, heartbeat: Heartbeat) -> int:
        if self.size > self.fits:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.size

    def smaller(self) -> Self | None:
        return replace(self, size=self.size // 2)


@dataclass(frozen=True)
class Allocates(Whole):
    """With torch or with Python."""

    size: int
    with_torch: bool

    def run(self, heartbeat: Heartbeat) -> int:
        if self.with_torch:
            import torch

            return torch.ones(self.size, dtype=torch.uint8).numel()
        return len(bytearray(self.size))


@dataclass(frozen=True)
class Keeps(Whole):
    """What it allocated."""

    size: int

    def run(self, heartbeat: Heartbeat) -> None:
        KEPT.append(bytearray(self.size))


@dataclass(frozen=True)
class Peaks(Whole):
    """At a size, and tells the most bytes that were held."""

    size: int

    def run(self, heartbeat: Heartbeat) -> int:
        from archdsl.search.trials.proxy_training import _peak_bytes

        held = bytearray(self.size)
        return _peak_bytes() + 0 * len(held)


def is_alive(pid: int) -> bool:
    """A process that has ended counts as dead, even if nobody has asked how."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(said.stdout.strip()) and not said.stdout.startswith("Z")


@dataclass(frozen=True)
class DiesAt(Whole):
    """A job that keeps its state after every step, and is killed before ``step`` is kept.

    In a group of processes, ``rank`` is the one that is killed.
    """

    job: Any
    step: int
    rank: int = 0

    def run(self, heartbeat: Heartbeat) -> None:
        from archdsl.search.trials import proxy_training

        proxy_training.SECONDS_APART = 0
        steps = iter(range(1, self.step + 1))

        def die() -> None:
            if next(steps) == self.step and os.environ["RANK"] == str(self.rank):
                os.kill(os.getpid(), signal.SIGKILL)

        self.job.run(die)


@dataclass(frozen=True)
class InGroup(Whole):
    """The sum over the ranks of a group; one of them may do something else instead."""

    note: Path
    rank: int = -1
    instead: Any = None

    def run(self, heartbeat: Heartbeat) -> float:
        from archdsl.nn.ranks import joined

        for _ in range(0 if self.instead else 4):  # each time they meet anew
            with joined("cpu"):
                pass
        with joined("cpu") as ranks:
            (self.note / str(ranks.rank)).write_text(str(os.getpid()))
            ranks.gather(None)  # all have noted theirs
            if ranks.rank == self.rank:
                self.instead.run(heartbeat)
            return ranks.sum(10**ranks.rank)[0]
