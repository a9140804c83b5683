"""What knowing the price costs: closed form against a meta build, fit, and building 162M itself.

python -m benchmarks.cost [--json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from archdsl.build import meta_model
from archdsl.cost import cost
from archdsl.leaves import defaults, fill
from archdsl.load import fitted, load, read
from archdsl.source import shipped_specs
from archdsl.spec import Budget

BUILD = """
import resource, time
import torch
import archdsl.build, archdsl.load
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
spec = archdsl.load("itt")
before, start = rss(), time.perf_counter()
model = archdsl.build(spec)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(time.perf_counter() - start, (rss() - before) / weights)
"""


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for name in sorted(shipped_specs()):
        spec = load(name)
        figures[f"cost {name}, us"] = 1e6 * seconds(lambda spec=spec: cost(spec), 200)
    itt, space = load("itt"), fill(read("search"), defaults)
    meta = seconds(lambda: meta_model(itt), 10)
    figures["meta build itt / its cost"] = meta / seconds(lambda: cost(itt), 200)
    figures["fit, ms"] = 1e3 * seconds(lambda: fitted(space, Budget(params=162_000_000)), 10)
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=True)
    took, memory = map(float, done.stdout.split())
    figures["build itt, s"] = took
    figures["build itt, peak memory / weights"] = memory
    if "--json" in sys.argv:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:36} {value:10.2f}")


def seconds(call: Callable[[], object], runs: int) -> float:
    """CPU seconds of one call, the median of five batches: neighbours do not count."""
    call()
    batches = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(max(1, runs // 5)):
            call()
        batches.append((time.process_time() - start) / max(1, runs // 5))
    return median(batches)


if __name__ == "__main__":
    main()
