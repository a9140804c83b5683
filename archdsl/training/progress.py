"""What a training run shows on stderr: a bar in a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


class TrainProgress:
    """Shows nothing at all unless ``shown``."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.steps = steps
        self.shown = shown
        self.last_line = time.monotonic()
        self.bar = _bar() if shown and sys.stderr.isatty() else None
        self.task = self.bar.add_task("", total=steps, facts="") if self.bar else TaskID(0)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def resumed(self, step: int) -> None:
        """The bar starts at ``step``, as if the steps before had taken no time."""
        if self.bar is not None:
            self.bar.reset(self.task, completed=step)
        self.note(f"resumed after step {step}/{self.steps}")

    def step(self, step: int, loss: float, tokens_per_s: float, shares: dict[str, float]) -> None:
        facts = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if shares:
            facts += f"  routed {sum(shares.values()) / len(shares):.0%}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, facts=facts)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or step == self.steps:
            self.note(f"step {step}/{self.steps}  {facts}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self.last_line = time.monotonic()
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)


def _bar() -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
