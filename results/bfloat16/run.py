"""Does training in bfloat16, with the stream of the layers in it, cost loss?

    python results/bfloat16/run.py [--seeds 3] [--store runs/bfloat16]

A plain model, Loop x4 and ITT x4 with two routers, of 1.2M parameters, are trained on 196,608 bytes
of the embedded text, in float32 and under autocast to bfloat16: from the same initial values, on
the same batches, at one learning rate that was tuned for none. All are scored in float32. Trained
runs stay in --store, so that the same command goes on where it was stopped; then result.json is
written here. About an hour of one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import archdsl
from archdsl.data.types import Data
from archdsl.files import write_text
from archdsl.lang.spec import ModelSpec
from archdsl.search.report.report import versions
from archdsl.search.stats.paired import paired
from archdsl.training.config import TrainConfig

HERE = Path(__file__).parent
SIZES = ["vocab_size=257", "context=128", "dim=112"]
LAYER = ["attention.head_size=16", "ffn.hidden=280"]
MODELS: dict[str, tuple[str, list[str], list[str]]] = {  # spec, its layers, and what else is set
    "plain": ("transformer", ["body.0"], []),
    "loop-x4": ("loop", ["body.0", "body.1.body"], []),
    "itt-x4": ("itt", ["body.0", "body.1.body"], []),
    "itt-x4-prefix": ("itt", ["body.0", "body.1.body"], ["body.1.router.kind=prefix"]),
}
CONFIG: dict[str, Any] = {
    "steps": 192,
    "batch_size": 8,
    "lr": 2e-3,
    "schedule": "constant",
    "device": "cpu",
}


def spec_of(name: str) -> ModelSpec:
    source, layers, more = MODELS[name]
    inner = [f"{layer}.{setting}" for layer in layers for setting in LAYER] + more
    return archdsl.load(source, overrides=[*SIZES, *(f"blocks.0.{one}" for one in inner)])


def losses(name: str, seed: int, data: Data, store: Path) -> dict[str, float]:
    """The held-out loss of a model after training in each data type, in nats per byte."""
    spec, found = spec_of(name), {}
    for dtype in ("float32", "bfloat16"):
        config = TrainConfig(**CONFIG, seed=seed, dtype=dtype)
        run = store / f"{name}-{dtype}-{seed}"
        model = archdsl.train(spec, data, config, out=run).model
        found[dtype] = archdsl.evaluate(model, data, limit_tokens=131_072).loss
        print(f"{name}, seed {seed}, {dtype}: {found[dtype]:.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store", type=Path, default=Path("runs/bfloat16"))
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds: one seed has no interval; use 2 or more")
    data, seeds = archdsl.load_data(), range(given.seeds)
    table = {}
    for name in MODELS:
        found = [losses(name, seed, data, given.store) for seed in seeds]
        single, half = ([one[dtype] for one in found] for dtype in ("float32", "bfloat16"))
        gap = paired(half, single)
        print(f"{name}: bfloat16 minus float32 {gap}", flush=True)
        table[name] = {
            "float32": fmean(single),
            "bfloat16": fmean(half),
            "difference": {"mean": gap.mean, "half_width": gap.half_width},
            "by_seed": found,
            "spec": spec_of(name).to_yaml(),
        }
    made_by = {"config": CONFIG, "seeds": list(seeds), "data": data.fingerprint}
    made_by["versions"] = versions()
    write_text(HERE / "result.json", json.dumps({"models": table, "made_by": made_by}, indent=1))


if __name__ == "__main__":
    main()
