"""The time of a training step of a plain LLaMA in archdsl and in other libraries.

A step is forward pass, loss, backward pass and fused AdamW.

python -m benchmarks.train_step [--spec benchmarks/specs/llama-10m.yaml] [--tokens 512] [--compile]

All libraries start from the same weights. Their logits, losses and the losses after two updates
must be equal before anything is timed. ``--compile`` also measures archdsl and transformers
compiled, and LitGPT on CUDA.

For the table of a GPU see benchmarks/gpu.py.
"""

from __future__ import annotations

from argparse import Namespace

import torch

from archdsl.costs.receipt import sequence_cost
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec
from benchmarks.measure import (
    ROOT,
    Timing,
    arguments,
    bar,
    check_equal,
    gemm_rate,
    interleaved,
    precision,
    progress,
    ratio,
    record,
)
from benchmarks.peers import peers_of, random_batch
from benchmarks.steps import Step, own_step, peer_step, trainer

REACH, BEAT = 1.03, 0.95  # targets, relative to the time of transformers in eager mode


def steps(spec: ModelSpec, args: Namespace) -> dict[str, Step]:
    """Returns the training step of each library. Raises NotEqual if their logits differ."""
    batch = random_batch(spec, args.batch, args.tokens)
    ours = trainer(spec, batch, args.device)
    made = {"archdsl": own_step(ours, batch)}
    for peer in peers_of(ours.model, extras=not args.small):
        made[peer.name] = peer_step(peer, batch, args.device)
    if args.compile:
        progress("compiling")
        compiled = trainer(spec, batch, args.device, compile=True)
        made["archdsl compiled"] = own_step(compiled, batch)
        for peer in peers_of(ours.model, extras=args.device == "cuda"):
            if peer.name != "x-transformers":
                step = peer_step(peer, batch, args.device, compiled=True)
                made[f"{peer.name} compiled"] = step
    ours.model.train()
    return made


def check(made: dict[str, Step], device: str) -> None:
    """Raises NotEqual if the losses differ before the first update or after one or two updates."""
    losses = {name: [step() for _ in range(3)] for name, step in made.items()}
    for name, found in losses.items():
        wanted = torch.tensor(losses["archdsl"])
        tolerance = 1e-4 if device == "cpu" else 1e-2  # bfloat16
        check_equal(f"three steps of {name}", torch.tensor(found), wanted, tolerance)


def figures(spec: ModelSpec, taken: dict[str, Timing], args: Namespace) -> dict[str, object]:
    """Returns the results to record."""
    tokens = args.batch * args.tokens
    flops = 3 * args.batch * sequence_cost(spec, tokens=args.tokens).flops
    gemm = gemm_rate(args.device, precision(args.device))
    found: dict[str, object] = {"GEMM, GFLOP/s": gemm / 1e9}
    for name, timing in taken.items():
        found[name] = {
            "step": timing,
            "tokens/s": tokens / timing.median,
            "GFLOP/s": flops / timing.median / 1e9,
            "of GEMM": flops / timing.median / gemm,
            "time / transformers": ratio(timing, taken["transformers"]),
        }
    best = min(
        (name for name in taken if name.startswith("archdsl")), key=lambda n: taken[n].median
    )
    against = ratio(taken[best], taken["transformers"])
    found["bar"] = {
        f"{best} / transformers": against,
        f"reach {REACH}, beat {BEAT}": bar(against.median, REACH, BEAT),
    }
    return found


def main() -> None:
    """Runs the benchmark. Exits with an error if logits or losses differ."""
    args = arguments(
        __doc__,
        spec={"default": str(ROOT / "benchmarks/specs/llama-10m.yaml"), "help": "a plain model"},
        tokens={"type": int, "help": "tokens per sequence (default: 512)"},
        batch={"type": int, "default": 1, "help": "number of sequences"},
        compile={"action": "store_true", "help": "also measure compiled models (takes minutes)"},
    )
    args.tokens = args.tokens or (64 if args.small else 512)
    spec = load(args.spec)
    made = steps(spec, args)
    check(made, args.device)
    taken = interleaved(made, rounds=args.rounds or (3 if args.small else 11), device=args.device)
    settings = {"spec": spec.name, "tokens": args.tokens, "batch": args.batch}
    record("train_step", settings, figures(spec, taken, args), args)


if __name__ == "__main__":
    main()
