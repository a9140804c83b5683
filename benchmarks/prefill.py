"""Prefill: reading a prompt into a KV cache, up to the logits after its last token.

python -m benchmarks.prefill [--spec benchmarks/specs/llama-10m.yaml] [--tokens 1024] [--batch 1]

It compares archdsl and other libraries with the same weights, each with its own empty cache. It
also measures archdsl reading in parts of 256 tokens, and the model of benchmarks/specs/itt-10m.yaml
with each router that selects the same tokens when decoding.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor

from archdsl.costs.receipt import sequence_cost
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import build
from archdsl.model.language_model import LanguageModel
from benchmarks.decode import Read, alike, ours, theirs
from benchmarks.measure import (
    ROOT,
    Timing,
    arguments,
    bar,
    check_equal,
    gemm_rate,
    interleaved,
    precision,
    ratio,
    record,
)
from benchmarks.peers import Peer

PART = 256  # tokens of each part of a prompt that is read in parts
ROUTERS = ("prefix", "threshold", "random")
Reading = Callable[[], Tensor]


def reading(new: Callable[[], Read], prompt_BT: Tensor, part: int | None = None) -> Reading:
    """Returns a function that reads the whole prompt into a new cache and returns logits [B, V].

    ``part``: the number of tokens to read at a time; by default all.
    """

    def read() -> Tensor:
        with torch.inference_mode():
            go_on = new()
            parts = prompt_BT.split(part or prompt_BT.size(1), 1)
            return [go_on(tokens_BT) for tokens_BT in parts][-1]

    return read


def plain(args: Namespace) -> tuple[dict[str, Reading], Tensor]:
    """Returns readers of the plain model by library, and the prompt [B, T].

    Raises NotEqual if their logits differ.
    """
    model, peers, prompt_BT = alike(args, args.tokens)

    def of_peer(peer: Peer) -> Reading:
        return reading(lambda: theirs(peer, args.batch), prompt_BT)

    made = {"archdsl": reading(lambda: ours(model), prompt_BT)}
    made |= {peer.name: of_peer(peer) for peer in peers}
    made["archdsl in parts"] = reading(lambda: ours(model), prompt_BT, PART)
    wanted_BV = made["archdsl"]()
    for name, read in made.items():
        tolerance = 1e-4 if precision(args.device) == torch.float32 else 5e-2
        check_equal(f"logits of {name}", read(), wanted_BV, tolerance)
    return made, prompt_BT


def routed(args: Namespace) -> dict[str, LanguageModel]:
    """Returns the routed model with each of the ROUTERS."""
    spec = load(args.routed)
    made = {}
    for kind in ROUTERS[: 1 if args.small else None]:
        model = build(spec.patch("blocks.0.body.1.router.kind", kind), device=args.device)
        made[kind] = model.to(precision(args.device)).for_decoding()
    return made


def flops_of(spec: ModelSpec, tokens: int) -> int:
    """Returns the FLOPs of reading a prompt; the head runs only for the last token."""
    head = 2 * spec.dim * spec.vocab_size
    return sequence_cost(spec, tokens=tokens).flops - (tokens - 1) * head


def figures(taken: dict[str, Timing], flops: dict[str, int], args: Namespace) -> dict[str, object]:
    """Returns the results to record."""
    gemm = gemm_rate(args.device, precision(args.device))
    found: dict[str, object] = {"GEMM, GFLOP/s": gemm / 1e9}
    for name, timing in taken.items():
        cost = args.batch * flops.get(name, flops["archdsl"])
        row: dict[str, object] = {
            "prompt": timing,
            "tokens/s": args.batch * args.tokens / timing.median,
            "of GEMM": cost / timing.median / gemm,
            "time / transformers": ratio(timing, taken["transformers"]),
        }
        if name in flops and name != "archdsl":
            time, part = ratio(taken[name], taken["archdsl"]), flops[name] / flops["archdsl"]
            value = time.median / part
            row |= {"time / plain": time, "FLOPs": part, "": bar(value, 1.05, 1.0)}
        found[name] = row
    against = ratio(taken["archdsl"], taken["transformers"])
    found["archdsl / transformers"] = {"": against, "bar": bar(against.median, 1.03, 0.95)}
    return found


def main() -> None:
    """Runs the benchmark. Exits with an error if logits differ."""
    args = arguments(
        __doc__,
        spec={"default": str(ROOT / "benchmarks/specs/llama-10m.yaml"), "help": "a plain model"},
        routed={"default": str(ROOT / "benchmarks/specs/itt-10m.yaml"), "help": "a routed model"},
        tokens={"type": int, "help": "length of the prompt in tokens (default: 1024)"},
        batch={"type": int, "default": 1, "help": "number of sequences"},
    )
    args.tokens = args.tokens or (300 if args.small else 1024)
    made, prompt_BT = plain(args)
    flops = {"archdsl": flops_of(load(args.spec), args.tokens)}
    for name, model in routed(args).items():
        made[name] = reading(lambda model=model: ours(model), prompt_BT)  # type: ignore[misc]
        flops[name] = flops_of(model.spec, args.tokens)
    rounds = args.rounds or (3 if args.small else 11)
    taken = interleaved(made, rounds=rounds, device=args.device)
    settings = {"spec": load(args.spec).name, "tokens": args.tokens, "batch": args.batch}
    record("prefill", settings, figures(taken, flops, args), args)


if __name__ == "__main__":
    main()
