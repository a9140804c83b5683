"""The time of the closed-form costs, compared with building the model on the meta device.

Also the time of solving a fit value, and time and memory of building the 162M model.

python -m benchmarks.cost [--json]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

from archdsl.costs.receipt import cost
from archdsl.lang.load import fitted, load, read
from archdsl.lang.source import shipped_specs
from archdsl.lang.spec import Budget
from archdsl.lang.template import defaults, fill
from archdsl.model.build import meta_model
from benchmarks.measure import NotEqual, arguments, bar, interleaved, ratio, record

BAR = 1 / 500  # the target: the time of the closed form over that of building on the meta device
BUILD = """
import resource, time
import torch
import archdsl.model.build, archdsl.lang.load
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
spec = archdsl.load("itt")
before, start = rss(), time.perf_counter()
model = archdsl.build(spec)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(time.perf_counter() - start, (rss() - before) / weights)
"""


def main() -> None:
    """Runs the benchmark. Exits with an error if a closed form does not equal the built model."""
    args = arguments(__doc__)
    rounds = args.rounds or (3 if args.small else 11)
    found: dict[str, object] = {}
    for name in ("tiny",) if args.small else sorted(shipped_specs()):
        spec = load(name)
        parameters = sum(weight.numel() for weight in meta_model(spec).parameters())
        if cost(spec).params != parameters:
            raise NotEqual(f"not equal: parameters of {name}")
        taken = interleaved({"cost": partial(cost, spec)}, rounds=rounds, calls=50)
        meta = interleaved({"meta": partial(meta_model, spec)}, rounds=3)
        against = taken["cost"].median / meta["meta"].median
        found[name] = {
            "cost, us": 1e6 * taken["cost"].median,
            "cost / meta build": against,
            "": bar(against, BAR),
        }
    space = fill(read("search"), defaults)
    fits: dict[str, Callable[[], object]] = {
        "fit": partial(fitted, space, Budget(params=162_000_000)),
        "cost": partial(cost, load("itt")),
    }
    taken = interleaved(fits, rounds=rounds)
    found["fit"] = taken["fit"]
    found["fit / cost of itt"] = ratio(taken["fit"], taken["cost"])
    if not args.small:
        call = [sys.executable, "-c", BUILD]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        seconds, memory = map(float, done.stdout.split())
        found["build itt, s"], found["build itt, peak memory / weights"] = seconds, memory
    record("cost", {}, found, args)


if __name__ == "__main__":
    main()
