"""Training by two processes of one thread each, compared with twice the speed of one such process.

python -m benchmarks.ranks [--spec benchmarks/specs/llama-10m.yaml] [--batch 8] [--tokens 512]

One process trains the batch alone; two, connected by gloo, train the same batch together, each half
of it. "apart" are two processes that each train half of the batch and never talk: what the machine
allows, as its cores share memory and perhaps more. Only one of the four groups runs at a time.
Results are the tokens per second over twice those of one process, and over those of "apart".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from archdsl.lang.load import load
from benchmarks.measure import ROOT, NotEqual, Ratio, arguments, bar, progress, record

WORKER = "ARCHDSL_BENCHMARK_WORKER"  # set in the processes that are timed
GOALS = {"ddp": (0.90, 0.95), "fsdp": (0.85, 0.95)}  # reach, beat


def work() -> None:
    """Runs in each process. It trains some steps, and writes the seconds of all but the first two.

    Its arguments are a spec, sequences, tokens, rounds, the value of ``parallel`` and a file.
    """
    import torch

    from archdsl.model.build import build
    from archdsl.nn.ranks import Parallel, joined
    from archdsl.training.config import TrainConfig
    from archdsl.training.trainer import Trainer
    from benchmarks.memory import Noise
    from benchmarks.peers import random_batch
    from benchmarks.steps import own_step

    name, rows, tokens, rounds, parallel, out = sys.argv[1:]
    torch.set_num_threads(1)
    spec, seconds = load(name), []
    batch = random_batch(spec, int(rows), int(tokens))
    config = TrainConfig(batch_size=int(rows), context=int(tokens), device="cpu")
    with joined("cpu", cast(Parallel, parallel)) as ranks:
        step = own_step(Trainer(build(spec), Noise(spec.vocab_size), config, ranks=ranks), batch)
        for _ in range(int(rounds) + 2):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        if ranks.first:
            Path(out).write_text(json.dumps(seconds[2:]))


def seconds(processes: int, parallel: str, words: tuple[str, ...]) -> list[float]:
    """Returns the seconds of each round. Raises NotEqual if a process fails."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "benchmarks.ranks"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", WORKER: "1"}
        ended = subprocess.run(
            [*command, *words, parallel, str(out)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise NotEqual(f"{processes} processes failed: {ended.stderr[-500:]}")
        return [float(one) for one in json.loads(out.read_text())]


def apart(words: tuple[str, ...]) -> list[float]:
    """Returns the seconds of each round of the slower of two processes that never talk."""
    name, rows, *others = words
    half = (name, str(int(rows) // 2), *others)
    with ThreadPoolExecutor(2) as two:
        both = two.map(lambda _: seconds(1, "ddp", half), range(2))
        return [max(pair) for pair in zip(*both, strict=True)]


def main() -> None:
    """Runs the benchmark."""
    args = arguments(
        __doc__,
        spec={"default": str(ROOT / "benchmarks/specs/llama-10m.yaml"), "help": "a plain model"},
        batch={"type": int, "default": 8, "help": "number of sequences"},
        tokens={"type": int, "default": 512, "help": "tokens per sequence"},
    )
    if args.small:
        args.spec, args.batch, args.tokens = "tiny", 2, 32
    rounds = args.rounds or (1 if args.small else 3)
    words = (args.spec, str(args.batch), str(args.tokens), str(rounds))
    groups: dict[str, Callable[[], list[float]]] = {
        "one": lambda: seconds(1, "ddp", words),
        "apart": lambda: apart(words),
        "ddp": lambda: seconds(2, "ddp", words),
        "fsdp": lambda: seconds(2, "fsdp", words),
    }
    taken: dict[str, list[float]] = {name: [] for name in groups}
    for turn in range(1 if args.small else 3):  # by turns, as the machine may be busy
        progress(f"turn {turn + 1}")
        for name, timed in groups.items():
            taken[name] += timed()

    def ratio(slow: str, fast: str, times: int) -> Ratio:
        return Ratio([a / (times * b) for a, b in zip(taken[slow], taken[fast], strict=True)])

    figures: dict[str, object] = {"apart": ratio("one", "apart", 2)}
    for name, (reach, beat) in GOALS.items():
        speed = ratio("one", name, 2)
        figures[name] = speed
        figures[f"{name}: bar"] = bar(speed.median, reach, beat, lower_is_better=False)
        figures[f"{name} over apart"] = ratio("apart", name, 1)
    settings = {"spec": load(args.spec).name, "batch": args.batch, "tokens": args.tokens}
    record("ranks", settings, figures, args)


if __name__ == "__main__":
    work() if WORKER in os.environ else main()
