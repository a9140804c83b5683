"""Show the progress of a training run on stderr.

In a terminal this is a progress bar, elsewhere a line every half minute.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


class TrainProgress:
    """The display of a training run of ``steps`` steps. It shows nothing unless ``shown``."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.steps = steps
        self.shown = shown
        self.last_line = self.began = time.monotonic()
        self.first_step = 0  # the step before the first one of this process
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
        """Start the progress bar at ``step``, and do not count the earlier steps in its speed."""
        self.first_step = step
        if self.bar is not None:
            self.bar.reset(self.task, completed=step)
        self.note(f"resumed after step {step}/{self.steps}")

    def step(self, step: int, loss: float, tokens_per_s: float, shares: dict[str, float]) -> None:
        """Show the loss (nats per token) and the speed after a step.

        ``shares``: the share of the tokens that each routed step selected, by its name.
        """
        facts = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if shares:
            facts += f"  routed {sum(shares.values()) / len(shares):.0%}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, facts=facts)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or step == self.steps:
            self.note(f"step {step}/{self.steps}  {facts}{self._left(step)}")

    def _left(self, step: int) -> str:
        """Return how long the steps after this one will take, at the mean speed so far."""
        seconds = (time.monotonic() - self.began) / max(1, step - self.first_step)
        left = timedelta(seconds=round(seconds * (self.steps - step)))
        return f"  {left} left" if left else ""

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
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
