"""What training and decoding take on one GPU, against the goals: one command, one table.

python -m benchmarks.gpu [--time 6m] [--rows loss,plain] [--json] [--small --device cpu]

Each row is a ratio within this run. Rows are measured in groups, the cheap ones first; compilation
counts as time. When the time is over, the table says which rows were not run. A row whose check
fails, or that needs a package which is not installed, says so. With --json each row is written to
a file in results/gpu (or in --out) as soon as it is measured, so that nothing is lost if the run is
ended. Nothing is read from the compiler's caches.

Groups: loss, launches, plain, decoding, itt, routers, shared. How a row is measured and checked
is in benchmarks/gpu_rows.py. `python -m benchmarks.launches` counts without a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

if __name__ == "__main__":
    STARTED = time.monotonic()  # imports count
    # torch reads it when it is imported
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch

from archdsl.search.config import parse_duration
from benchmarks import gpu_rows
from benchmarks.gpu_rows import Row, Sizes, Skipped
from benchmarks.measure import (
    ROOT,
    NotEqual,
    arguments,
    bar,
    commit,
    device_name,
    progress,
    versions,
)


class Goal(NamedTuple):
    """What a row says, what it was before this was worked on, and the two goals."""

    what: str
    before: str
    reach: float
    beat: float | None
    lower: bool = True


GOALS = {
    "loss": Goal("loss, forward + backward / compiled, all at once", "3.7", 1.3, 1.1),
    "loss_memory": Goal("the same, GiB above its inputs", ".1", 0.5, None),
    "launches": Goal("eager routed step / full pass, launches", "about 3", 1.5, 1.2),
    "plain": Goal("plain, training step / best peer, compiled", "1.30", 1.0, 0.95),
    "mfu": Goal("the same, share of the bf16 peak", ".365", 0.45, 0.5, False),
    "decode": Goal("decode, plain / transformers static + compile", "1.80", 1.0, 0.8),
    "decode_nobody": Goal("decode, nobody routed / plain", "3.80", 1.15, 1.05),
    "decode_half": Goal("decode, half routed, saved/ideal", "-.13", 0.7, 0.9, False),
    "compile": Goal("ITT x4, compilation in seconds", "4 x 11-29", 40, 20),
    "itt_half": Goal("ITT x4, top_k .5, saved/ideal", ".36 eager", 0.85, 0.95, False),
    "itt_most": Goal("ITT x4, top_k .9, time / its loop", "1.07", 0.97, 0.94),
    "own": Goal("one loop x2, top_k .5, own keys, saved/ideal", ".57 (x4)", 0.85, 0.95, False),
    "prefix": Goal("one loop x2, prefix / top_k at .5", "1.11 (x4)", 1.03, 1.0),
    "threshold": Goal("one loop x2, threshold / top_k at .5", "1.03 (x4)", 1.03, 1.0),
    "predictor": Goal("one loop x2, predictor / top_k at .5", "", 1.03, 1.0),
    "shared": Goal("one loop x2, top_k .5, shared keys, saved/ideal", ".00 (x4)", 0.75, 0.9, False),
}


class Group(NamedTuple):
    """Rows that are measured together, and the seconds that they take on an H100."""

    run: Callable[[Sizes], Iterator[Row]]
    rows: tuple[str, ...]
    seconds: float


GROUPS = {
    "loss": Group(gpu_rows.loss, ("loss", "loss_memory"), 20),
    "launches": Group(gpu_rows.launches, ("launches",), 10),
    "plain": Group(gpu_rows.plain, ("plain", "mfu"), 80),
    "decoding": Group(gpu_rows.decoding, ("decode", "decode_nobody", "decode_half"), 90),
    "itt": Group(gpu_rows.itt, ("compile", "itt_half", "itt_most"), 90),
    "routers": Group(gpu_rows.routers, ("own", "prefix", "threshold", "predictor"), 60),
    "shared": Group(gpu_rows.shared, ("shared",), 30),
}


class OutOfTime(BaseException):
    """The time is over. Not an Exception, so that nothing on the way takes it for a fault."""


@dataclass
class Report:
    """The rows so far: what was measured, and why others were not. ``path``: where to write."""

    facts: dict[str, object]
    path: Path | None
    rows: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Adds a measured row and writes the file."""
        goal = GOALS[row.name]
        word = bar(row.value, goal.reach, goal.beat, lower_is_better=goal.lower)
        found = {"measured": row.value, "bar": word, "details": row.details}
        self._put(row.name, found | ({"note": f"; {row.note}"} if row.note else {}))
        progress(f"{row.name}: {row.value:.3f}, {word}")

    def without(self, names: tuple[str, ...], why: str) -> None:
        """Notes why rows were not measured, except those that were."""
        for name in names:
            if name not in self.rows:
                self._put(name, {"bar": why})
                progress(f"{name}: {why}")

    def _put(self, name: str, found: dict[str, object]) -> None:
        goal = GOALS[name]
        fixed = {"before": goal.before, "reach": goal.reach, "beat": goal.beat}
        self.rows[name] = {"what": goal.what} | fixed | found
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            half = self.path.with_suffix(".part")
            all_of_it = self.facts | {"versions": versions(), "rows": self.rows}
            half.write_text(json.dumps(all_of_it, indent=1) + "\n")
            half.replace(self.path)

    def table(self) -> Iterator[str]:
        """The table, in the order of the goals."""
        names = [name for name in GOALS if name in self.rows]
        width = max((len(GOALS[name].what) for name in names), default=0)
        yield f"{'':{width}}  {'before':>10} {'reach':>6} {'beat':>6} {'now':>7}"
        for name in names:
            goal, row = GOALS[name], self.rows[name]
            now = f"{row['measured']:7.3f}" if "measured" in row else f"{'-':>7}"
            beat = "-" if goal.beat is None else f"{goal.beat:g}"
            goals = f"{goal.before:>10} {goal.reach:>6g} {beat:>6}"
            yield f"{goal.what:{width}}  {goals} {now}  {row['bar']}{row.get('note', '')}"


def run(groups: Mapping[str, Group], at: Sizes, report: Report, seconds: float) -> None:
    """Measures the groups one after the other, as long as there is time."""
    end = time.monotonic() + seconds
    for name, group in groups.items():
        left = end - time.monotonic()
        if left <= (0 if at.small else group.seconds / 3):
            why = f"not run: takes {group.seconds:.0f} s, {max(0, left):.0f} left"
            report.without(group.rows, why)
            continue
        progress(f"{name}, {left:.0f} s left")
        try:
            with out_of_time_after(left):
                for row in group.run(at):
                    report.add(row)
        except OutOfTime:
            report.without(group.rows, "not run: the time was over")
        except Skipped as why_not:
            report.without(group.rows, f"skipped: {why_not}")
        except (Exception, NotEqual) as error:
            told = " ".join(str(error).split())
            report.without(group.rows, f"failed: {type(error).__name__}: {told[:160]}")
        _free(at)


def _free(at: Sizes) -> None:
    torch.compiler.reset()
    gc.collect()
    if at.device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def out_of_time_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds; a compilation that runs then goes on to
    its end first."""

    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # again each second, as Python ignores what is raised while it frees an object
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(started: float | None = None) -> None:
    """Measures the rows and prints the table. Exits with status 1 if a check or a row failed.

    ``started``: when the time began, by `time.monotonic`; None: now.
    """
    started = started or time.monotonic()
    options: dict[str, dict[str, Any]] = {
        "time": {"type": parse_duration, "default": "6m", "help": "such as 6m"},
        "rows": {"default": ",".join(GROUPS), "help": "groups to measure, in this order"},
        "out": {"type": Path, "default": ROOT / "results" / "gpu", "help": "folder for --json"},
        "compile": {"action": "store_true", "help": "compile on a CPU, too"},
    }
    args = arguments(__doc__, device="cuda", **options)
    unknown = [name for name in args.rows.split(",") if name not in GROUPS]
    if unknown:
        sys.exit(f"--rows: there is no group {unknown[0]}; there are {', '.join(GROUPS)}")
    at = Sizes(args.device, args.device != "cpu" or args.compile, args.small)
    now = datetime.now(UTC)
    facts: dict[str, object] = {
        "device": device_name(args.device),
        "small": args.small,
        "commit": commit(),
        "date": now.isoformat(timespec="seconds"),
    }
    path = args.out / f"{now:%Y-%m-%dT%H%M%S}.json" if args.json else None
    report = Report(facts, path)
    groups = {name: GROUPS[name] for name in args.rows.split(",")}
    run(groups, at, report, args.time - (time.monotonic() - started) - 10)
    print(*report.table(), sep="\n")
    if any(str(row["bar"]).startswith("failed") for row in report.rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(STARTED)
