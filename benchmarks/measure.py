"""What all benchmarks share: contenders take turns, and only equal computations are timed.

On a CPU with one thread the time of a call is the CPU time of the process, which hardly depends on
other processes. With several threads it is wall time; on an accelerator it is the time between two
events.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

import torch
from torch import Tensor

from archdsl.errors import ArchdslError
from archdsl.nn.devices import BFLOAT16, device_named

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results" / "bench.jsonl"
PACKAGES = ("archdsl", "torch", "transformers", "litgpt", "x-transformers", "optuna")


class NotEqual(SystemExit):
    """The contenders compute different things: the script exits with status 1 before timing."""


@dataclass(frozen=True)
class Timing:
    """The seconds of one call, for each round."""

    name: str
    rounds: list[float]

    @property
    def median(self) -> float:
        """The median over the rounds, in seconds."""
        return median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and upper quartile over the rounds, in seconds."""
        return quartiles(self.rounds)


@dataclass(frozen=True)
class Ratio:
    """The time of one contender divided by that of another, for each round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return median(self.rounds)

    @property
    def low(self) -> float:
        """The lower quartile over the rounds."""
        return quartiles(self.rounds)[0]

    @property
    def high(self) -> float:
        """The upper quartile over the rounds."""
        return quartiles(self.rounds)[1]


def quartiles(values: list[float]) -> tuple[float, float]:
    """Returns the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 1,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Times contenders in turns.

    In each round every contender is called ``calls`` times; the order rotates from round to round.
    Returns the seconds of one call by contender.
    """
    for _ in range(1 if device == "cpu" else 3):
        for call in contenders.values():
            call()
    timed = {name: partial(_seconds, call, calls, device) for name, call in contenders.items()}
    return in_turns(timed, rounds)


def in_turns(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Does the same as `interleaved` for contenders that return the seconds they took."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed[name]())
    return {name: Timing(name, taken) for name, taken in seconds.items()}


def _seconds(call: Callable[[], object], calls: int, device: str) -> float:
    if device != "cpu":
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.accelerator.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    for _ in range(calls):
        call()
    return (clock() - before) / calls


def ratio(a: Timing, b: Timing) -> Ratio:
    """Returns the time of ``a`` divided by that of ``b``, for each round."""
    return Ratio([x / y for x, y in zip(a.rounds, b.rounds, strict=True)])


def precision(device: str) -> torch.dtype:
    """Returns the type for training: bfloat16 is nine times slower than float32 on a CPU."""
    return torch.bfloat16 if device in BFLOAT16 else torch.float32


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Measures the FLOP/s of a large matrix product on this machine."""
    n = 1536 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    taken = interleaved({"gemm": lambda: a @ b}, rounds=7, device=device)["gemm"].median
    return 2.0 * n**3 / taken


def check_equal(name: str, a: Tensor, b: Tensor, tolerance: float = 1e-4) -> float:
    """Returns the largest difference divided by the largest absolute value of ``b``.

    Raises NotEqual if it is above ``tolerance`` or NaN, or if the shapes differ.
    """
    if a.shape != b.shape:
        raise NotEqual(f"not equal: {name}: {list(a.shape)} and {list(b.shape)}")
    far = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
    if not far <= tolerance:  # this is also true for NaN
        raise NotEqual(f"not equal: {name}: they differ by {far:.1e} (tolerance {tolerance:.0e})")
    progress(f"equal: {name} (to {far:.0e}, tolerance {tolerance:.0e})")
    return far


def bar(value: float, reach: float, beat: float | None = None, lower_is_better: bool = True) -> str:
    """Returns "beat" if the value meets the target ``beat``, "reach" if it meets ``reach``, or else
    "short"."""
    sign = 1 if lower_is_better else -1
    if beat is not None and sign * value <= sign * beat:
        return "beat"
    return "reach" if sign * value <= sign * reach else "short"


def progress(line: str) -> None:
    """Prints a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def arguments(
    doc: str | None, *, device: str = "cpu", **extra: Mapping[str, Any]
) -> argparse.Namespace:
    """Parses the command line.

    ``device``: the default device. ``extra``: further options for ``add_argument``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help=f"append the results to results/{RECORD.name}")
    add("--small", action="store_true", help="run for seconds instead of minutes, as in CI")
    add("--device", choices=["cpu", "cuda", "xpu", "mps"], default=device)
    add(
        "--threads", type=int, default=1, help="number of threads; more than one measures wall time"
    )
    add("--rounds", type=int, help="number of rounds (the default depends on the script)")
    for name, options in extra.items():
        add(f"--{name.replace('_', '-')}", **options)
    args = parser.parse_args()
    try:
        device_named(args.device)
    except ArchdslError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    return args


def record(
    benchmark: str,
    settings: Mapping[str, object],
    figures: Mapping[str, object],
    args: argparse.Namespace,
) -> None:
    """Prints the results, one per line. With --json it also appends a line to results/bench.jsonl.

    A result is a number, a word, a Ratio, a Timing (in seconds), or a dict of these.
    """
    width = max(map(len, figures), default=0)
    for name, figure in figures.items():
        print(f"{name:{width}}  {shown(figure)}")
    if args.json:
        line = json.dumps(
            {
                "benchmark": benchmark,
                "settings": {"small": args.small, "threads": args.threads} | dict(settings),
                "figures": figures,
                "versions": versions(),
                "device": device_name(args.device),
                "commit": commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            default=plain,
        )
        print(line)
        RECORD.parent.mkdir(exist_ok=True)
        # one unbuffered write, so that the lines of two runs do not mix
        with RECORD.open("ab", buffering=0) as file:
            file.write(f"{line}\n".encode())


def shown(figure: object) -> str:
    """Formats a result for the terminal."""
    match figure:
        case Mapping():
            return "  ".join(f"{name} {shown(value)}" for name, value in figure.items())
        case Ratio():
            return f"{figure.median:.3f} ({figure.low:.3f}-{figure.high:.3f})"
        case Timing():
            low, high = figure.spread
            return f"{1e3 * figure.median:.4g} ms ({1e3 * low:.4g}-{1e3 * high:.4g})"
        case float():
            return f"{figure:.4g}"
        case _:
            return str(figure)


def plain(figure: object) -> dict[str, float]:
    """Converts a Timing or a Ratio to its median and quartiles for JSON."""
    low, high = quartiles(figure.rounds)  # type: ignore[attr-defined]
    return {"median": median(figure.rounds), "low": low, "high": high}  # type: ignore[attr-defined]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the imported packages."""
    imported = {name for name in PACKAGES if name.replace("-", "_") in sys.modules}
    found = {name: _version(name) for name in sorted(imported)}
    return {"python": platform.python_version()} | found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # imported from a folder


def device_name(device: str) -> str:
    """Returns the name of the GPU, or of the CPU and its vector instructions."""
    if device in BFLOAT16:
        return cast(str, torch.get_device_module(device).get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """Returns the git commit, with "+dirty" if tracked files outside results/ are changed."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(ROOT), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # git is not installed, or this is not a repository
