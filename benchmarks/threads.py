"""Training on all cores while another process is busy on one of them, compared with one core.

python -m benchmarks.threads [--spec benchmarks/specs/llama-10m.yaml] [--tokens 512]

Threads of OpenMP wait for each other in a busy loop. If one of them shares its core with another
process, all wait for that process too. `archdsl` sets OpenMP to let waiting threads sleep; torch
does not. The results are in wall time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from archdsl.data.types import Batch
from archdsl.lang.load import load
from benchmarks.measure import (
    ROOT,
    NotEqual,
    Ratio,
    Timing,
    arguments,
    bar,
    in_turns,
    progress,
    ratio,
    record,
)

REACH, BEAT = 0.85, 0.95
OURS = "from archdsl.cli import let_idle_threads_sleep; let_idle_threads_sleep(); "
WORK = "from benchmarks.threads import work; work()"
BUSY = "import torch; torch.set_num_threads(1); a = torch.ones(512, 512)\nwhile True: a @ a"


class Worker:
    """A process that trains one step for each call."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self()  # waits until the process is ready

    def __call__(self) -> float:
        """Returns the seconds of one step. Raises NotEqual if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise NotEqual(f"a worker ended with status {self.process.wait()}")
        return float(line)


def work() -> None:
    """Runs in the process of a worker, whose arguments are a spec, rows and tokens.

    It trains one step for each line of stdin and prints the seconds.
    """
    from benchmarks.peers import random_batch
    from benchmarks.steps import own_step, trainer

    spec, rows, tokens = load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    batch: Batch = random_batch(spec, rows, tokens)
    step = own_step(trainer(spec, batch), batch)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


@contextmanager
def python(code: str, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Yields a Python process that runs ``code`` with the arguments ``words``; then kills it."""
    fixed = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=fixed | environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def speeds(taken: Mapping[str, Timing]) -> dict[str, Ratio]:
    """Returns the speed of each contender relative to one thread."""
    return {name: ratio(taken["one thread"], timing) for name, timing in taken.items()}


def main() -> None:
    """Runs the benchmark."""
    args = arguments(
        __doc__,
        spec={"default": str(ROOT / "benchmarks/specs/llama-10m.yaml"), "help": "a plain model"},
        batch={"type": int, "default": 2, "help": "number of sequences"},
        tokens={"type": int, "default": 512, "help": "tokens per sequence"},
    )
    if args.small:
        args.spec, args.batch, args.tokens = "tiny", 1, 32
    rounds = args.rounds or (1 if args.small else 7)
    words = (args.spec, str(args.batch), str(args.tokens))
    with ExitStack() as open_:

        def worker(code: str, **environment: str) -> Worker:
            return Worker(open_.enter_context(python(code, *words, **environment)))

        workers = {
            "one thread": worker(OURS + WORK, OMP_NUM_THREADS="1"),
            "all cores, archdsl": worker(OURS + WORK),
            "all cores, torch alone": worker(WORK),
        }
        progress("alone")
        alone = in_turns(workers, rounds)
        progress("while another process is busy on one core")
        open_.enter_context(python(BUSY))
        busy = in_turns(workers, rounds)
    found = speeds(busy)
    verdict = bar(found["all cores, archdsl"].median, REACH, BEAT, lower_is_better=False)
    figures: dict[str, object] = {f"alone: {name}": r for name, r in speeds(alone).items()}
    figures |= {f"busy neighbour: {name}": r for name, r in found.items()}
    settings = {"cores": os.cpu_count(), "spec": load(args.spec).name}
    settings |= {"batch": args.batch, "tokens": args.tokens}
    record("threads", settings, figures | {"bar": verdict}, args)


if __name__ == "__main__":
    main()
