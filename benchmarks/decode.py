"""Decoding with a KV cache, token by token: archdsl and other libraries, and the effect of routing.

python -m benchmarks.decode [--spec benchmarks/specs/llama-10m.yaml] [--prompt 128] [--batch 1]

All models have the same weights, decode greedily from the same prompt, and must find the same
tokens. Then the model of benchmarks/specs/itt-10m.yaml is measured with thresholds that select no
token ("nobody"), about half of the tokens ("half") and every token ("all").

For the table of a GPU see benchmarks/gpu.py.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from archdsl.blocks.modules.threshold import Threshold
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import build
from archdsl.model.compute_meter import metered
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import LanguageModel
from benchmarks.measure import (
    ROOT,
    NotEqual,
    Ratio,
    arguments,
    bar,
    interleaved,
    precision,
    progress,
    ratio,
    record,
)
from benchmarks.peers import Peer, peers_of, random_batch, weights_to

CALLS = 8  # tokens that are decoded per call
CONTEXT = 1024  # tokens that a cache can hold
Read = Callable[[Tensor], Tensor]  # from the next tokens [B, T] to the logits [B, V] of the last


class Greedy:
    """Greedy decoding from a prompt; each call decodes CALLS tokens."""

    def __init__(self, read: Read, prompt_BT: Tensor) -> None:
        self.read = read
        self.token_B1 = self._next(prompt_BT)
        self.found = [self.token_B1]

    def _next(self, tokens_BT: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.read(tokens_BT).argmax(-1, keepdim=True)

    def __call__(self) -> None:
        for _ in range(CALLS):
            self.token_B1 = self._next(self.token_B1)
            self.found.append(self.token_B1)

    @property
    def tokens(self) -> list[list[int]]:
        """All decoded tokens of each row."""
        return torch.cat(self.found, 1).tolist()


def ours(model: LanguageModel, room: int = CONTEXT) -> Read:
    """Reads with a cache of archdsl for ``room`` tokens."""
    cache = model.new_cache(room)
    return lambda tokens_BT: model.next_logits(tokens_BT, cache=cache)


def graphed(model: LanguageModel, rows: int, compiled: bool = False) -> Read:
    """Reads as `archdsl.generate` does on CUDA: the prompt at once, then each token with captured
    CUDA graphs, of compiled layers if that is asked for."""
    cache, step = model.new_cache(CONTEXT), None

    def read(tokens_BT: Tensor) -> Tensor:
        nonlocal step
        if tokens_BT.size(1) > 1:
            return model.next_logits(tokens_BT, cache=cache)
        step = step or TokenStep(model, cache, rows, compiled=compiled)
        return step(tokens_BT[:, 0].tolist())

    return read


def reader(model: LanguageModel, args: Namespace) -> Read:
    """Returns the fastest way of reading with archdsl on the device."""
    return graphed(model, args.batch, args.compile) if args.device == "cuda" else ours(model)


def theirs(peer: Peer, batch: int) -> Read:
    """Reads with the cache of the other library."""
    model: Any = peer.model.eval()
    if peer.name == "transformers":
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        return lambda tokens_BT: model(
            tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
    if peer.name == "LitGPT":
        device = next(model.parameters()).device
        model.max_seq_length = CONTEXT
        model.set_kv_cache(batch_size=batch, device=device, dtype=next(model.parameters()).dtype)
        place = [0]

        def read(tokens_BT: Tensor) -> Tensor:
            pos_T = torch.arange(place[0], place[0] + tokens_BT.size(1), device=device)
            place[0] += tokens_BT.size(1)
            return model(tokens_BT, pos_T, input_pos_maxp1=place[0])[:, -1]

        return read
    return _x_transformers(model)


def _x_transformers(model: torch.nn.Module) -> Read:
    """Reads with x-transformers, which takes all tokens so far at every step."""
    so_far: list[Tensor] = []
    cache = None

    def read(tokens_BT: Tensor) -> Tensor:
        nonlocal cache
        so_far.append(tokens_BT)
        logits_BTV, cache = model(torch.cat(so_far, 1), cache=cache, return_intermediates=True)
        return logits_BTV[:, -1]

    return read


def theirs_static(peer: Peer, device: torch.device, *, compiled: bool = True) -> Read:
    """Reads with transformers in its fastest way on a GPU: one graph of the whole step."""
    from transformers import StaticCache

    model: Any = peer.model.eval()
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    step = model.forward
    if compiled:
        step = torch.compile(step, mode="reduce-overhead", dynamic=False)
    past = 0

    def read(tokens_BT: Tensor) -> Tensor:
        nonlocal past
        pos_T = torch.arange(past, past + tokens_BT.size(1), device=device)
        past += tokens_BT.size(1)
        call = model.forward if tokens_BT.size(1) > 1 else step
        return (
            call(
                tokens_BT,
                past_key_values=cache,
                cache_position=pos_T,
                position_ids=pos_T.unsqueeze(0),
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .clone()
        )

    return read


def alike(args: Namespace, tokens: int) -> tuple[LanguageModel, list[Peer], Tensor]:
    """Returns the model, other libraries with the same weights, and a prompt [B, T].

    All models are in the precision of the device.
    """
    spec = load(args.spec)
    model = build(spec, device=args.device)
    prompt_BT = random_batch(spec, args.batch, tokens, args.device).tokens_BT
    peers = list(peers_of(model, extras=not args.small))
    for peer in peers:
        weights_to(peer.model, precision(args.device))
    return model.to(precision(args.device)).for_decoding(), peers, prompt_BT


def plain(args: Namespace) -> tuple[dict[str, Greedy], Tensor]:
    """Returns decoders of the plain model by library, and the prompt [B, T].

    Raises NotEqual if they decode different tokens.
    """
    model, peers, prompt_BT = alike(args, args.prompt)
    made = {"archdsl": Greedy(reader(model, args), prompt_BT)}
    for peer in peers:
        made[peer.name] = Greedy(theirs(peer, args.batch), prompt_BT)
    if args.compile:
        peer = peers[0]
        made[f"{peer.name} static"] = Greedy(theirs_static(peer, prompt_BT.device), prompt_BT)
    for name, greedy in made.items():
        greedy()
        if greedy.tokens != made["archdsl"].tokens:
            raise NotEqual(f"not equal: {name} decodes other tokens")
        progress(f"equal: {name} decodes the same {CALLS + 1} tokens")
    return made, prompt_BT


def routed(spec: ModelSpec, device: str) -> dict[str, LanguageModel]:
    """Returns routed models in which no token, half of them and every token take further steps.

    ``spec``: a stack of a layer and a loop; its router becomes a threshold router.
    """
    spec = spec.patch("blocks.0.body.1.router.kind", "threshold")
    made = {}
    for name in ("nobody", "half", "all"):
        model = made[name] = build(spec, device=device)
        model.train()(random_batch(spec, 2, min(256, spec.context), device).tokens_BT)
        model.commit()  # sets the thresholds
        for router in model.routers:
            if name == "nobody" and isinstance(router, Threshold):
                router.quantiles_RQ.fill_(math.inf)
        model.dial(1.0 if name == "all" else None)
        model.eval()
    return made


def executed_flops(model: LanguageModel, prompt_BT: Tensor, turns: int) -> float:
    """Returns the executed FLOPs per token over ``turns`` calls.

    This is measured separately from the time, because counting takes time.
    """
    cache = model.new_cache(CONTEXT)
    greedy = Greedy(lambda tokens_BT: model(tokens_BT, cache=cache)[:, -1], prompt_BT)
    with metered(model) as meter:
        for _ in range(turns):
            greedy()
    return meter.flops_per_token


def main() -> None:
    """Runs the benchmark. Exits with an error if the libraries decode different tokens."""
    args = arguments(
        __doc__,
        spec={"default": str(ROOT / "benchmarks/specs/llama-10m.yaml"), "help": "a plain model"},
        routed={"default": str(ROOT / "benchmarks/specs/itt-10m.yaml"), "help": "a routed model"},
        prompt={"type": int, "default": 128, "help": "length of the prompt in tokens"},
        batch={"type": int, "default": 1, "help": "number of sequences"},
        compile={"action": "store_true", "help": "compile, also transformers with a static cache"},
    )
    made, prompt_BT = plain(args)
    models = routed(load(args.routed), args.device)
    for name, model in models.items():
        model.to(precision(args.device)).for_decoding()
        made[name] = Greedy(reader(model, args), prompt_BT)
    rounds = args.rounds or (3 if args.small else 15)
    taken = interleaved(made, rounds=rounds, device=args.device)
    found: dict[str, object] = {}
    for name, timing in taken.items():
        found[name] = {
            "ms/token": 1e3 * timing.median / CALLS,
            "tokens/s": args.batch * CALLS / timing.median,
            "time / archdsl": ratio(timing, taken["archdsl"]),
        }
    against = ratio(taken["archdsl"], taken["transformers"])
    found["archdsl / transformers"] = {"": against, "bar": bar(against.median, 0.9, 0.75)}
    none = ratio(taken["nobody"], taken["archdsl"])
    found["nobody / plain"] = {"": none, "bar": bar(none.median, 1.10, 1.05)}
    flops = {name: executed_flops(model, prompt_BT, rounds) for name, model in models.items()}
    part = 1 - flops["half"] / flops["all"]
    saved = Ratio([(1 - r) / part for r in ratio(taken["half"], taken["all"]).rounds])
    found["half: saved/ideal"] = {
        "": saved,
        "FLOPs / all": flops["half"] / flops["all"],
        "bar": bar(saved.median, 0.7, 0.9, lower_is_better=False),
    }
    settings = {"spec": load(args.spec).name, "prompt": args.prompt, "batch": args.batch}
    record("decode", settings, found, args)


if __name__ == "__main__":
    main()
