"""Does looping pay? Each small model of the family beside plain models and a loop of equal FLOPs.

    python results/family/run.py [--workers N] [--seeds 3] [--steps 300]

Every model is trained on the embedded text and on p-hop, a skill that needs depth, at width 32 and
with the seeds 1, 2, ...; so are a plain model and a plain loop of equal FLOPs. All see the same
batches in the same order, at one learning rate that was not tuned for any of them. Scores go to
runs/family as they are made, so that the same command goes on where it was stopped; then
result.json and README.md are written here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import archdsl
from archdsl.files import make_folder, write_text
from archdsl.lang.load import load
from archdsl.search.analysis.baselines import EQUAL_FLOPS, EQUAL_FLOPS_LOOP, EQUAL_PARAMS, WINNER
from archdsl.search.analysis.comparison import (
    ComparisonEntry,
    as_json,
    comparison_jobs,
    differences,
    entries,
    run_comparison,
    winner_of,
)
from archdsl.search.analysis.conclusions import conclusion
from archdsl.search.trials.proxy import Job, Proxy, Task
from archdsl.search.workers.pool import process_pool

HERE = Path(__file__).parent
FAMILY = {
    "tiny": "ITT",
    "ouro-tiny": "Ouro",
    "ponder-tiny": "PonderNet",
    "huginn-tiny": "Huginn",
    "mor-lora-tiny": "MoR with LoRA",
    "relaxed-recursive-tiny": "relaxed recursive",
    "cotformer-tiny": "CoTFormer",
    "dnd-tiny": "Dynamic Nested Depth",
    "moeut-tiny": "MoEUT",
}
HOP = "skill:p-hop,hops=3,length=32,alphabet=4"


def proxy(steps: int) -> Proxy:
    """The sizes and tasks of a search's proxies (see docs/log.md).

    Text gets a third of the steps, as a step reads twice as many tokens there."""
    text = Task(context=128, batch_size=16, rungs=(max(1, steps // 3),), eval_tokens=32_768)
    hop = Task(data=HOP, context=32, batch_size=32, rungs=(steps,), eval_tokens=32_768)
    return Proxy(dim=32, head_size=16, repeat=2, tasks={"text": text, "p-hop": hop})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="training steps on p-hop")
    parser.add_argument("--store", type=Path, default=Path("runs/family"))
    given = parser.parse_args()
    make_folder(given.store)
    tasks, seeds = proxy(given.steps), range(1, 1 + given.seeds)
    specs = {name: load(name) for name in FAMILY}
    jobs: dict[tuple[str, str, str, int], Job] = {
        (family, *key): job
        for family, spec in specs.items()
        for key, job in comparison_jobs(spec, tasks, seeds, given.store, ablate=False).items()
    }
    for family in FAMILY:
        names = {key[1] for key in jobs if key[0] == family}
        # where the plain model of equal parameters has equal FLOPs, it stands for both
        kept = {WINNER, EQUAL_FLOPS if EQUAL_FLOPS in names else EQUAL_PARAMS, EQUAL_FLOPS_LOOP}
        jobs = {key: job for key, job in jobs.items() if key[0] != family or key[1] in kept}
    first: dict[tuple[Path, int], tuple[str, str, str, int]] = {}
    for key, job in jobs.items():  # equal baselines of several models are trained once
        first.setdefault((job.stored_run.folder, job.steps), key)
    with process_pool(given.workers) as pool:
        run_comparison(pool, {key: jobs[key] for key in first.values()}, lambda: True, tell)
    results = {key: job.stored_score() for key, job in jobs.items()}
    found = {}
    for family, spec in specs.items():
        own = {key[1:]: job for key, job in jobs.items() if key[0] == family}
        scores = {key[1:]: score for key, score in results.items() if key[0] == family and score}
        made = entries(spec, own, scores)
        found[family] = [
            replace(entry, name=FAMILY[family]) if entry.role == "winner" else entry
            for entry in made
        ]
    write_text(HERE / "result.json", json.dumps(facts(found, tasks, given), indent=1))
    write_text(HERE / "README.md", "\n".join(page(found, tasks, given)) + "\n")


def tell(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"{progress}  ", end="\r", file=sys.stderr, flush=True)


def facts(
    found: dict[str, list[ComparisonEntry]], tasks: Proxy, given: argparse.Namespace
) -> dict[str, Any]:
    return {
        "versions": {
            "archdsl": archdsl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seeds": given.seeds,
        "proxy": tasks.model_dump(mode="json"),
        "data": {name: task.load().fingerprint for name, task in tasks.tasks.items()},
        "models": {
            family: {"verdict": conclusion(of_family, tasks), "entries": as_json(of_family, tasks)}
            for family, of_family in found.items()
        },
    }


def page(
    found: dict[str, list[ComparisonEntry]], tasks: Proxy, given: argparse.Namespace
) -> Iterator[str]:
    yield "# The family beside plain models and loops of equal FLOPs\n"
    yield (
        f"Made by `python results/family/run.py --seeds {given.seeds} --steps {given.steps}` "
        f"(torch {torch.__version__}). Width 32, at most two copies of each stack, "
        f"{tasks.tasks['text'].rungs[-1]} steps of 2,048 bytes of text and "
        f"{tasks.tasks['p-hop'].rungs[-1]} steps of 1,024 tokens of p-hop (three hops). Losses are "
        "validation losses in nats, as means over the seeds. A difference is the baseline's loss "
        "minus the model's, with the 95% interval of paired seeds: above 0, the model is better. "
        "-: at this size, that baseline is the model itself or the plain one.\n"
    )
    for task in tasks.tasks:
        yield f"## {task}\n"
        yield f"| model | loss | {EQUAL_FLOPS} | {EQUAL_FLOPS_LOOP} |"
        yield "|---|---|---|---|"
        for of_family in found.values():
            yield row(of_family, tasks, task)
        yield ""
    yield "## In words\n"
    for family, of_family in found.items():
        yield f"- `{family}`: {conclusion(of_family, tasks)}"


def row(of_family: Sequence[ComparisonEntry], tasks: Proxy, task: str) -> str:
    own = winner_of(of_family)
    assert own is not None
    gaps = differences(of_family, tasks)
    cells = [own.name, f"{sum(own.losses(task)) / len(own.losses(task)):.3f}"]
    for name in (EQUAL_FLOPS, EQUAL_FLOPS_LOOP):
        gap = gaps.get(name, gaps.get(EQUAL_PARAMS, {}) if name == EQUAL_FLOPS else {}).get(task)
        cells.append("-" if gap is None else f"{gap.mean:+.3f} ± {gap.half_width:.3f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
