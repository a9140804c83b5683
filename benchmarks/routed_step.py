"""How much of the FLOPs that routing saves becomes saved time, in forward and backward passes.

python -m benchmarks.routed_step [--dim 256] [--tokens 512] [--router top_k] [--whole]

A routed layer takes further steps for a share of the tokens. It is compared with the loop in which
every token takes these steps. Only the time of the further steps is compared:

    time          (routed - layer) / (loop - layer)
    FLOPs         the same ratio in closed form
    saved/ideal   (1 - time) / (1 - FLOPs): it is 1 if every saved FLOP saves time

Most public code computes all tokens and then masks the result. This is measured too ("masked") and
must give the same output and the same gradients. ``--whole`` measures a training step of a whole
model instead, by default benchmarks/specs/itt-10m.yaml, and compares it with its loop without
routing and its plain model.

For the table of a GPU see benchmarks/gpu.py.

Shapes: B batch, T tokens, H heads, E head size, D width.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.modules.attention import Attention
from archdsl.blocks.modules.layer import Layer
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.costs.receipt import block_cost, sequence_cost
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context, rotate
from archdsl.nn.gather import take
from benchmarks.measure import (
    ROOT,
    Ratio,
    Timing,
    arguments,
    bar,
    check_equal,
    interleaved,
    precision,
    ratio,
    record,
)
from benchmarks.peers import random_batch
from benchmarks.steps import own_step, trainer

CAPACITIES = (0.3, 0.5, 0.7, 0.9)
FURTHER = 3  # further steps, as in ITT x4
ITT = str(ROOT / "benchmarks/specs/itt-10m.yaml")


def looped(args: Namespace, kv: str, capacity: float | None, steps: int) -> LoopSpec:
    layer = {"kind": "layer", "attention": {"head_size": 64}, "ffn": {"hidden": 3 * args.dim}}
    routed = {"router": {"kind": args.router, "capacity": capacity}} if capacity else {}
    given: dict[str, Any] = {"steps": steps, "residual": "thinking", "encoding": "scale", "kv": kv}
    return LoopSpec.model_validate(given | routed | {"body": layer})


def module(spec: LoopSpec, args: Namespace) -> nn.Module:
    """Builds the block; its weights do not depend on the router."""
    model = ModelSpec(name="step", vocab_size=2, context=args.tokens, dim=args.dim, blocks=(spec,))
    made = LanguageModel(model)
    made.initialise(0)
    return made.blocks[0].to(args.device, precision(args.device)).train()


def forward_backward(block: Callable[..., Tensor], x_BTD: Tensor, weights: nn.Module) -> Tensor:
    weights.zero_grad(set_to_none=True)
    x_BTD.grad = None
    y_BTD = block(x_BTD)
    y_BTD.backward(torch.ones_like(y_BTD))
    return y_BTD


def masked(loop: BodyLoop, x_BTD: Tensor) -> Tensor:
    """Returns the output [B, T, D] of the loop, but computes every token in every step."""
    (body,) = loop.bodies
    assert isinstance(body, Layer)
    ctx = Context()
    x_BTD, kv = _layer(body, x_BTD, None, None)
    x_BTD = loop.encoding.after(x_BTD, 0)
    for one in loop.passes[1:]:
        assert one.routed is not None
        assert loop.router is not None
        chosen = loop.router(x_BTD, one.routed, ctx, None)
        mask_BT = chosen.mask(x_BTD.size(1))
        weight_BK = loop.router.weights(take(x_BTD, chosen.index_BK), one.routed, chosen)
        assert weight_BK is not None
        gate_BT = torch.zeros_like(x_BTD[..., 0]).scatter(1, chosen.index_BK, weight_BK)
        shared = kv if loop.spec.kv == "shared" else None
        y_BTD, _ = _layer(body, x_BTD, mask_BT, shared)
        new_BTD = loop.spec.residual.join(
            x_BTD, y_BTD, gate_BT, partial(loop.encoding.after, step=one.step)
        )
        x_BTD = torch.where(mask_BT.unsqueeze(-1), new_BTD, x_BTD)
    return x_BTD


def _layer(
    layer: Layer, x_BTD: Tensor, mask_BT: Tensor | None, kv: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the output of a plain layer in which a query attends to the earlier selected keys."""
    attention, T = layer.attention, x_BTD.size(1)
    assert isinstance(attention, Attention)
    assert attention.theta is not None
    n_BTD = layer.attention_norm(x_BTD)

    def heads(linear: nn.Linear) -> Tensor:
        return linear(n_BTD).unflatten(-1, (-1, attention.head_size)).transpose(1, 2)

    q_BHTE = heads(attention.q)
    table = Context().rope(q_BHTE, attention.theta)
    if kv is None:
        kv = rotate(heads(attention.k), table), heads(attention.v)
        seen = None if mask_BT is None else mask_BT[:, None, None, :]
    else:
        seen = None
    if seen is not None:
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril()
        own_TT = torch.eye(T, dtype=torch.bool, device=x_BTD.device)
        seen = (causal_TT & seen) | own_TT  # itself, so that every query has a key
    y_BHTE = F.scaled_dot_product_attention(
        rotate(q_BHTE, table), *kv, attn_mask=seen, is_causal=seen is None
    )
    x_BTD = x_BTD + attention.o(y_BHTE.transpose(1, 2).flatten(2))
    return x_BTD + layer.ffn(layer.ffn_norm(x_BTD), Context()), kv


def compare(args: Namespace, kv: str, x_BTD: Tensor) -> dict[str, Timing]:
    capacities = CAPACITIES[1:2] if args.small else CAPACITIES
    made: dict[str, Callable[[], Tensor]] = {}
    plain, loop = (
        module(looped(args, kv, None, 1), args),
        module(looped(args, kv, None, 1 + FURTHER), args),
    )
    for name, block in {"layer": plain, "loop": loop}.items():
        made[name] = partial(forward_backward, partial(block, ctx=Context()), x_BTD, block)
    for capacity in capacities:
        routed = module(looped(args, kv, capacity, 1 + FURTHER), args)
        assert isinstance(routed, BodyLoop)
        made[f"{capacity:g}"] = partial(_routed, routed, x_BTD)
        everything = partial(forward_backward, partial(masked, routed), x_BTD, routed)
        check(f"{kv} {capacity:g}", routed, x_BTD, made[f"{capacity:g}"], everything)
        if capacity == 0.5:
            made["masked 0.5"] = everything
    return interleaved(made, rounds=args.rounds or (3 if args.small else 9), device=args.device)


def _routed(block: BodyLoop, x_BTD: Tensor) -> Tensor:
    return forward_backward(partial(block, ctx=Context()), x_BTD, block)


def check(
    name: str,
    block: BodyLoop,
    x_BTD: Tensor,
    one: Callable[[], Tensor],
    other: Callable[[], Tensor],
) -> None:
    def found(call: Callable[[], Tensor]) -> list[Tensor]:
        y_BTD = call().detach()
        slopes = [p.grad.clone() for p in block.parameters() if p.grad is not None]
        assert x_BTD.grad is not None
        return [y_BTD, x_BTD.grad.clone(), *slopes]

    tolerance = 1e-4 if x_BTD.dtype == torch.float32 else 5e-2
    for number, (a, b) in enumerate(zip(found(one), found(other), strict=True)):
        what = ("output", "gradient of the stream")[number] if number < 2 else "gradient"
        check_equal(f"{what} at {name}, masked", a, b, tolerance)


def flops(args: Namespace, kv: str, capacity: float | None, steps: int) -> int:
    spec = looped(args, kv, capacity, steps)
    return block_cost(spec, args.dim, args.tokens).flops


def figures(args: Namespace, kv: str, taken: dict[str, Timing]) -> dict[str, object]:
    layer, loop = taken["layer"].rounds, taken["loop"].rounds
    layer_flops, loop_flops = (flops(args, kv, None, n) for n in (1, 1 + FURTHER))
    found: dict[str, object] = {
        f"{kv} loop / layer": {
            "time": ratio(taken["loop"], taken["layer"]),
            "FLOPs": loop_flops / layer_flops,
        }
    }
    for name, timing in taken.items():
        if name in ("layer", "loop"):
            continue
        part = (flops(args, kv, float(name.split()[-1]), 1 + FURTHER) - layer_flops) / (
            loop_flops - layer_flops
        )
        spent = [(r - a) / (b - a) for r, a, b in zip(timing.rounds, layer, loop, strict=True)]
        time, saved = Ratio(spent), Ratio([(1 - one) / (1 - part) for one in spent])
        word = bar(saved.median, 0.8, 0.9, lower_is_better=False)
        found[f"{kv} {name}"] = {"time": time, "FLOPs": part, "saved/ideal": saved, "": word}
    return found


def whole(args: Namespace) -> dict[str, object]:
    """Measures training steps of a model in which half of the layers are routed, per FLOP."""
    routed = load(args.spec)
    unrouted = routed.patch("blocks.0.body.1.router", None)
    plain = unrouted.patch("blocks.0.body.1.steps", 1)
    batch = random_batch(routed, args.batch, args.tokens)
    specs = {"loop": unrouted, "plain": plain}
    specs |= {f"itt {c:g}": routed.patch("blocks.0.body.1.router.capacity", c) for c in CAPACITIES}
    made = {
        name: own_step(trainer(spec, batch, args.device), batch) for name, spec in specs.items()
    }
    taken = interleaved(made, rounds=args.rounds or 11, device=args.device)
    cost = {name: sequence_cost(spec, tokens=args.tokens).flops for name, spec in specs.items()}
    found: dict[str, object] = {}
    for name in specs:
        for base, limits in {"loop": (0.02, 0.0), "plain": (1.05, 1.0)}.items():
            if name in (base, "plain"):
                continue
            time, part = ratio(taken[name], taken[base]), cost[name] / cost[base]
            value = time.median - part if base == "loop" else time.median / part
            label = "time - FLOPs" if base == "loop" else "time / FLOPs"
            row: dict[str, object] = {"time": time, "FLOPs": part, label: value}
            if base == "loop":
                row["saved/ideal"] = (1 - time.median) / (1 - part)
            found[f"{name} / {base}"] = row | {"": bar(value, *limits)}
    return found


def main() -> None:
    args = arguments(
        __doc__,
        dim={"type": int, "default": 256, "help": "width"},
        tokens={"type": int, "help": "tokens per sequence (default: 512)"},
        batch={"type": int, "default": 2, "help": "number of sequences"},
        router={"default": "top_k", "help": "kind of the router"},
        whole={"action": "store_true", "help": "measure whole models instead of one layer"},
        spec={"default": ITT, "help": "the model for --whole, a stack of a layer and a loop"},
    )
    args.tokens = args.tokens or (64 if args.small else 512)
    settings = {name: getattr(args, name) for name in ("dim", "tokens", "batch", "router")}
    if args.whole:
        settings["spec"] = load(args.spec).name
        record("routed_step whole", settings, whole(args), args)
        return
    torch.manual_seed(0)
    x_BTD = torch.randn(
        args.batch, args.tokens, args.dim, device=args.device, dtype=precision(args.device)
    ).requires_grad_()
    found: dict[str, object] = {}
    for kv in ("own", "shared"):
        found |= figures(args, kv, compare(args, kv, x_BTD))
    record("routed_step", settings, found, args)


if __name__ == "__main__":
    main()
