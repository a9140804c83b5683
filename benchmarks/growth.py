"""How costs grow with context, capacity, steps, layers and batch size, compared with closed forms.

python -m benchmarks.growth [--small] [--out results/growth]

A small ITT is made larger along one axis at a time. The benchmark measures the seconds of a
training step, its peak memory, the milliseconds of decoding a token and the microseconds of the
cost model itself. Dashed lines show the closed forms: the memory in bytes, and the FLOPs divided by
the FLOP/s of the first point of the axis. The time of the cost model has no closed form; it should
depend only on the number of different parts. Writes growth.json and growth.png.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from archdsl.costs.receipt import cost, sequence_cost
from archdsl.lang.source import from_value
from archdsl.lang.spec import ModelSpec, parse_spec
from archdsl.model.build import build
from archdsl.reports.training_memory import training_memory
from benchmarks.decode import CALLS, Greedy, ours
from benchmarks.measure import ROOT, arguments, commit, device_name, interleaved, progress, versions
from benchmarks.memory import measured
from benchmarks.peers import random_batch
from benchmarks.steps import own_step, trainer

BASE = {"context": 1024, "capacity": 0.5, "steps": 3, "layers": 4, "batch": 1}
SMALL = {"context": 128, "steps": 2, "layers": 2}
AXES: dict[str, tuple[float, ...]] = {
    "context": (256, 512, 1024, 2048, 4096, 8192),
    "capacity": (0.1, 0.25, 0.5, 0.75, 0.95),
    "steps": (1, 2, 3, 4, 6, 8),
    "layers": (2, 4, 8, 16, 32),
    "batch": (1, 2, 4, 8, 16),
}
MEASURES = {
    "step": "training step, s",
    "memory": "peak memory, MB",
    "decode": "decoding, ms/token",
    "cost": "cost model, us",
}


def spec_at(point: Mapping[str, float]) -> ModelSpec:
    """Returns the spec of the small ITT with the sizes ``point``, which are named as in BASE."""
    layer = {"kind": "layer", "attention": {"head_size": 64}, "ffn": {"hidden": 384}}
    loop = {
        "kind": "loop",
        "steps": int(point["steps"]),
        "router": {"kind": "prefix", "capacity": point["capacity"]},
        "residual": {"kind": "thinking"},
        "encoding": {"kind": "scale"},
        "body": layer,
    }
    stack = {"kind": "stack", "repeat": int(point["layers"]) // 2, "body": [layer, loop]}
    tree = {
        "name": "growth",
        "vocab_size": 1024,
        "context": int(point["context"]),
        "dim": 128,
        "tie_embeddings": True,
        "blocks": [stack],
    }
    return parse_spec(from_value(tree, "growth"))


def measure(point: Mapping[str, float], args: Namespace) -> dict[str, float]:
    """Measures one point; the units are those in MEASURES."""
    spec, rows, tokens = spec_at(point), int(point["batch"]), int(point["context"])
    batch = random_batch(spec, rows, tokens)
    rounds = args.rounds or (1 if args.small else 3)
    step = own_step(trainer(spec, batch, args.device), batch)
    found = {"step": interleaved({"": step}, rounds=rounds, device=args.device)[""].median}
    found["memory"] = measured(spec, rows, args.device, context=tokens) / 1e6
    # the cache is nearly full, but has room for all tokens that are decoded
    left = CALLS * (rounds + 1) + 1
    prompt_BT = batch.tokens_BT[:, : tokens - left].to(args.device)
    greedy = Greedy(ours(build(spec, device=args.device).for_decoding(), tokens), prompt_BT)
    taken = interleaved({"": greedy}, rounds=rounds, device=args.device)[""]
    found["decode"] = 1e3 * taken.median / CALLS
    found["cost"] = 1e6 * interleaved({"": lambda: cost(spec)}, rounds=5, calls=20)[""].median
    return found


def closed(point: Mapping[str, float]) -> dict[str, float]:
    """Returns the FLOPs of a training step and of decoding a token, and the peak memory in MB."""
    spec, rows, tokens = spec_at(point), int(point["batch"]), int(point["context"])
    return {
        "step": 3.0 * rows * sequence_cost(spec, tokens=tokens).flops,
        "memory": training_memory(spec, rows, tokens).peak / 1e6,
        "decode": rows * sequence_cost(spec, tokens=tokens).flops / tokens,
    }


def grown(args: Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measures all points of all axes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, values in AXES.items():
        found[axis] = []
        for value in values[:2] if args.small else values:
            point = BASE | (SMALL if args.small else {}) | {axis: value}
            figures = measure(point, args)
            progress(f"{axis} {value:g}: " + ", ".join(f"{k} {v:.3g}" for k, v in figures.items()))
            found[axis].append({"at": value, "measured": figures, "closed": closed(point)})
    return found


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots the measures and the closed forms, one column for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(MEASURES), len(found), figsize=(3 * len(found), 2.6 * len(MEASURES)), squeeze=False
    )
    for column, (axis, points) in enumerate(found.items()):
        at = [point["at"] for point in points]
        for row, (name, label) in enumerate(MEASURES.items()):
            plot = grid[row][column]
            seen = [point["measured"][name] for point in points]
            plot.plot(at, seen, "o-", label="measured")
            if name in points[0]["closed"]:
                formula = [point["closed"][name] for point in points]
                scale = 1.0 if name == "memory" else seen[0] / formula[0]
                plot.plot(at, [scale * one for one in formula], "k--", label="closed form")
            if axis != "capacity":
                plot.set_xscale("log", base=2)
                plot.set_xticks(at, [f"{one:g}" for one in at])
                if name in ("step", "memory"):
                    plot.set_yscale("log", base=2)
                    plot.yaxis.set_major_formatter("{x:.3g}")
            if plot.get_yscale() == "linear":
                plot.set_ylim(0)
            plot.minorticks_off()
            if column == 0:
                plot.set_ylabel(label)
            if row == len(MEASURES) - 1:
                plot.set_xlabel(axis)
    grid[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Runs the benchmark and writes growth.json and growth.png."""
    args = arguments(
        __doc__,
        out={
            "type": Path,
            "default": ROOT / "results" / "growth",
            "help": "the folder to write to",
        },
    )
    found = grown(args)
    args.out.mkdir(parents=True, exist_ok=True)
    made_by = {"base": BASE, "versions": versions(), "commit": commit()}
    made_by |= {"device": device_name(args.device), "threads": torch.get_num_threads()}
    (args.out / "growth.json").write_text(json.dumps(made_by | {"axes": found}, indent=1) + "\n")
    draw(found, args.out / "growth.png")
    print(f"wrote {args.out}/growth.json and growth.png")


if __name__ == "__main__":
    main()
