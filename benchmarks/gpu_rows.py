"""The rows of `benchmarks.gpu`: how each is measured, and how its correctness is checked.

A group of rows is a function that yields a row as soon as it is measured. Correctness is checked by
logits on given tokens: the error of a contender is that of its logits in bfloat16 relative to those
in float32, the median over tokens (some tokens of a routed model take other steps after rounding).

Shapes: B batch, T tokens, N all tokens, V vocabulary, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from archdsl.costs.receipt import sequence_cost
from archdsl.data.types import Batch
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import build
from archdsl.model.compute_meter import metered
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import LanguageModel
from archdsl.model.loss import summed_cross_entropy
from archdsl.training.trainer import Trainer
from benchmarks.decode import Read, routed, theirs_static
from benchmarks.launches import looped, of_step, total
from benchmarks.measure import (
    NotEqual,
    Timing,
    device_name,
    gemm_rate,
    interleaved,
    precision,
    progress,
    ratio,
)
from benchmarks.memory import allocated
from benchmarks.peers import peers_of, random_batch, weights_to
from benchmarks.steps import Step, own_step, peer_step, trainer

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, by the data sheet
TOKENS = 8  # that are decoded in one call
CLOSE = 0.05  # the largest error of logits in bfloat16


class Skipped(Exception):  # noqa: N818  the name states what happened
    """A row cannot be measured here; the message says why."""


class Row(NamedTuple):
    """A measured row: its name, the figure, what it was computed from, and a word on it."""

    name: str
    value: float
    details: Mapping[str, object]
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """What is measured on ``device``: the 162M specs, or small ones, ``compiled`` or not."""

    device: str
    compiled: bool
    small: bool

    @property
    def plain(self) -> ModelSpec:
        """The plain model of eight layers."""
        return _shrunk(load("transformer"), 1) if self.small else load("transformer")

    def itt(self, router: str | None, capacity: float = 0.5) -> ModelSpec:
        """The ITT x4; without a router its loop x4."""
        spec = _shrunk(load("itt"), 2) if self.small else load("itt")
        if router is None:
            return spec.patch("blocks.0.body.1.router", None)
        spec = spec.patch("blocks.0.body.1.router.kind", router)
        return spec.patch("blocks.0.body.1.router.capacity", capacity)

    def loop(self, kv: str, router: str | None, steps: int = 2) -> ModelSpec:
        """A model of a single loop and a vocabulary of two tokens."""
        dim = 64 if self.small else 1024
        hidden, head = dim * 5 // 2, 16 if self.small else 64
        sizes = {"tokens": self.tokens, "dim": dim, "hidden": hidden, "head": head}
        return looped(sizes, steps, kv, router)

    @property
    def tokens(self) -> int:
        """The length of a sequence in training."""
        return 64 if self.small else 4096

    @property
    def rows(self) -> int:
        """Sequences in a batch of a plain model or of a single loop."""
        return 2 if self.small else 8

    @property
    def rows_itt(self) -> int:
        """Sequences in a batch of an ITT x4."""
        return 2 if self.small else 4

    @property
    def loss(self) -> tuple[int, int, int]:
        """Tokens, width and vocabulary of the loss alone."""
        return (256, 64, 512) if self.small else (32768, 1024, 32000)

    @property
    def prompt(self) -> int:
        """Tokens that a decoder reads at once before it decodes."""
        return 8 if self.small else 128

    @property
    def checked(self) -> int:
        """Tokens after the prompt whose logits are checked."""
        return 8 if self.small else 32

    @property
    def rounds(self) -> int:
        """Rounds of an interleaved measurement."""
        return 2 if self.small else 7

    @property
    def room(self) -> int:
        """Tokens of a cache."""
        return 64 if self.small else 1024

    def timed(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """The seconds of each contender; they take turns."""
        return interleaved(contenders, rounds=self.rounds, device=self.device)


def _shrunk(spec: ModelSpec, layers: int) -> ModelSpec:
    spec = spec.patch("dim", 64).patch("vocab_size", 128).patch("context", 64)
    spec = spec.patch("blocks.0.repeat", 1)
    for place in ("0", "1.body")[:layers]:
        spec = spec.patch(f"blocks.0.body.{place}.attention.head_size", 16)
        spec = spec.patch(f"blocks.0.body.{place}.ffn.hidden", 160)
    return spec


def loss(at: Sizes) -> Iterator[Row]:
    """The loss and its gradients in parts, over all logits at once in one compiled function."""
    N, D, V = at.loss
    rng = torch.Generator().manual_seed(0)
    dtype = precision(at.device)
    x_ND, w_VD = (torch.randn(n, D, generator=rng).to(at.device, dtype) for n in (N, V))
    w_VD.mul_(D**-0.5)
    target_N = torch.randint(V, (N,), generator=rng).to(at.device)

    def at_once(x_ND: Tensor, w_VD: Tensor) -> Tensor:
        return F.cross_entropy(x_ND @ w_VD.t(), target_N, reduction="sum")

    def ours(x_ND: Tensor, w_VD: Tensor) -> Tensor:
        return summed_cross_entropy([x_ND], w_VD, target_N)

    def call(loss_of: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> list[Tensor]:
        x_ND, w_VD = (one.detach().requires_grad_() for one in given)
        nats = loss_of(x_ND, w_VD)
        return [nats.detach(), *torch.autograd.grad(nats, (x_ND, w_VD))]

    other = torch.compile(at_once, dynamic=False) if at.compiled else at_once
    made = {"archdsl": partial(call, ours, x_ND, w_VD), "at once": partial(call, other, x_ND, w_VD)}
    exact = call(at_once, x_ND.float(), w_VD.float())
    errors = {
        name: [_apart(a, b) for a, b in zip(one(), exact, strict=True)]
        for name, one in made.items()
    }
    _refuse("the loss or its gradients", max(errors["archdsl"]), CLOSE)
    del exact
    taken = at.timed(made)
    peaks = {name: allocated(one, at.device).peak / 2**30 for name, one in made.items()}
    details = {"ms": _ms(taken), "errors of nats and gradients": errors}
    yield Row("loss", ratio(taken["archdsl"], taken["at once"]).median, details)
    yield Row("loss_memory", peaks["archdsl"], {"GiB": peaks})


def plain(at: Sizes) -> Iterator[Row]:
    """A training step of the plain model, ours and that of others; and the share of the peak."""
    _needs("transformers")
    spec = at.plain
    batch = random_batch(spec, at.rows, at.tokens)
    ours = trainer(spec, batch, at.device)
    made = {"archdsl": own_step(ours, batch)}
    errors = {"archdsl": _error(ours.model, ours.model, batch, at)}
    for peer in peers_of(ours.model, without="x-transformers"):
        errors[peer.name] = _error(ours.model, peer.model.train(), batch, at, peer.logits)
        name = f"{peer.name} compiled" if at.compiled else peer.name
        made[name] = peer_step(peer, batch, at.device, compiled=at.compiled)
    _refuse("the logits of archdsl", errors["archdsl"], CLOSE)
    ours.model.train()
    if at.compiled:
        made["archdsl compiled"] = own_step(trainer(spec, batch, at.device, compile=True), batch)
    exact = own_step(trainer(spec, batch, at.device, dtype="float32"), batch)
    losses = {name: _losses(step) for name, step in ({"float32": exact} | made).items()}
    del exact
    for name, found in losses.items():
        worst = max(abs(a / b - 1) for a, b in zip(found, losses["float32"], strict=True))
        _refuse(f"three losses of {name}", worst, 1e-2)
    taken = at.timed(made)
    mine = min((n for n in made if n.startswith("archdsl")), key=lambda n: taken[n].median)
    best = min((n for n in made if not n.startswith("archdsl")), key=lambda n: taken[n].median)
    details = {"ms": _ms(taken), "error": errors, "losses": losses}
    yield Row("plain", ratio(taken[mine], taken[best]).median, details, f"{mine} / {best}")
    flops = 3 * at.rows * sequence_cost(spec, tokens=at.tokens).flops
    peak, source = _peak(at)
    share = flops / taken[mine].median / peak
    yield Row("mfu", share, {"ms": _ms(taken), "FLOPs": flops, "peak": peak}, f"peak of {source}")


def _losses(step: Step) -> list[float]:
    return [step() for _ in range(3)]


def _peak(at: Sizes) -> tuple[float, str]:
    name = device_name(at.device)
    for card, peak in PEAK.items():
        if card in name:
            return peak, card
    return gemm_rate(at.device, precision(at.device)), "a matrix product"


def itt(at: Sizes) -> Iterator[Row]:
    """The ITT x4 against its own loop x4, compiled: time of compilation and saved time."""
    specs = {"loop": at.itt(None), ".5": at.itt("top_k", 0.5), ".9": at.itt("top_k", 0.9)}
    batch = random_batch(specs["loop"], at.rows_itt, at.tokens)
    made: dict[str, Step] = {}
    errors: dict[str, object] = {}
    seconds: dict[str, float] = {}

    def add(name: str) -> None:
        one = trainer(specs[name], batch, at.device, compile=at.compiled)
        made[name] = own_step(one, batch)
        seconds[name] = _first_step(made[name], at)
        errors[name] = _close(one, batch, at)

    add(".5")
    yield Row("compile", seconds[".5"], {"s": dict(seconds)})
    add("loop")
    yield _saved("itt_half", specs[".5"], specs["loop"], at, made, errors)
    add(".9")
    taken = at.timed({name: made[name] for name in ("loop", ".9")})
    details = {"ms": _ms(taken), "error": errors, "compile s": seconds}
    note = f"FLOPs {_flops(specs['.9'], at) / _flops(specs['loop'], at):.3f}"
    yield Row("itt_most", ratio(taken[".9"], taken["loop"]).median, details, note)


def shared(at: Sizes) -> Iterator[Row]:
    """A loop of two passes with shared keys, half of the tokens in the second, over all tokens."""
    specs = {"loop": at.loop("shared", None), ".5": at.loop("shared", "top_k")}
    made, errors, seconds = _trained(specs, at)
    details = errors | {"compile s": seconds}
    yield _saved("shared", specs[".5"], specs["loop"], at, made, details)


def routers(at: Sizes) -> Iterator[Row]:
    """The same with its own keys, and each router over top_k."""
    specs = {"loop": at.loop("own", None), ".5": at.loop("own", "top_k")}
    made, errors, seconds = _trained(specs, at)
    details = errors | {"compile s": seconds}
    yield _saved("own", specs[".5"], specs["loop"], at, made, details)
    made.pop("loop")
    for name in ("prefix", "threshold", "predictor"):
        other, errors, seconds = _trained({name: at.loop("own", name)}, at)
        taken = at.timed(made | other)
        details = {"ms": _ms(taken), "error": errors[name], "compile s": seconds[name]}
        yield Row(name, ratio(taken[name], taken[".5"]).median, details)


def _trained(
    specs: Mapping[str, ModelSpec], at: Sizes
) -> tuple[dict[str, Step], dict[str, object], dict[str, float]]:
    made: dict[str, Step] = {}
    errors: dict[str, object] = {}
    seconds: dict[str, float] = {}
    for name, spec in specs.items():
        batch = random_batch(spec, at.rows, at.tokens)
        one = trainer(spec, batch, at.device, compile=at.compiled)
        made[name] = own_step(one, batch)
        seconds[name] = _first_step(made[name], at)
        errors[name] = _close(one, batch, at)
    return made, errors, seconds


def _saved(
    row: str,
    routed: ModelSpec,
    loop: ModelSpec,
    at: Sizes,
    made: Mapping[str, Step],
    errors: Mapping[str, object],
) -> Row:
    taken = at.timed({name: made[name] for name in ("loop", ".5")})
    time, part = ratio(taken[".5"], taken["loop"]).median, _flops(routed, at) / _flops(loop, at)
    details = {"ms": _ms(taken), "error": dict(errors)}
    return Row(row, (1 - time) / (1 - part), details, f"time {time:.3f}, FLOPs {part:.3f}")


def _flops(spec: ModelSpec, at: Sizes) -> int:
    return sequence_cost(spec, tokens=at.tokens).flops


def launches(at: Sizes) -> Iterator[Row]:
    """Kernels that an eager routed step launches, over those of a full pass of the same loop."""
    found = {}
    for router in ("top_k", "prefix"):
        full, step = (_kernels_of_pass(at, one) for one in (None, router))
        found[router] = {"full pass": full, "routed step": step, "": step / full}
    yield Row("launches", max(one[""] for one in found.values()), {"kernels": found})


def _kernels_of_pass(at: Sizes, router: str | None) -> float:
    if at.device == "cpu":
        sizes = {"batch": 2, "tokens": 64, "dim": 64, "head": 16, "hidden": 160}
        return total(of_step(sizes, "own", router)).launches
    three, two = (_kernels(at, at.loop("own", router, steps)) for steps in (3, 2))
    return three - two


def _kernels(at: Sizes, spec: ModelSpec) -> int:
    batch = random_batch(spec, 2, at.tokens)
    step = own_step(trainer(spec, batch, at.device), batch)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() or () if event.device_type.name == "CUDA"]
    return sum(not event.name.startswith("Mem") for event in events)


def decoding(at: Sizes) -> Iterator[Row]:
    """Decoding of one sequence with a cache: given tokens, of which the host reads each answer."""
    count = min(at.prompt + at.checked + 2 * TOKENS * (at.rounds + 3), at.room)
    tokens_BT = random_batch(at.plain, 1, count).tokens_BT
    made = {"plain": _decoder(build(at.plain, device=at.device), tokens_BT, at)}
    errors = {"plain": made["plain"].errors}
    if find_spec("transformers") is not None:
        other = _transformers_decoder(made["plain"].wanted_TV, tokens_BT, at)
        taken = at.timed(made | {"transformers": other})
        details = {"ms/token": _ms(taken, TOKENS), "error": errors | {"transformers": other.errors}}
        yield Row("decode", ratio(taken["plain"], taken["transformers"]).median, details)
    flops = {}
    for name, one in routed(at.itt("threshold"), at.device).items():
        flops[name] = _executed(one, tokens_BT, at)
        made[name] = _decoder(one, tokens_BT, at)
        errors[name] = made[name].errors
    taken = at.timed(made)
    more = {"ms/token": _ms(taken, TOKENS), "FLOPs per token": flops, "error": errors}
    yield Row("decode_nobody", ratio(taken["nobody"], taken["plain"]).median, more)
    time, part = ratio(taken["half"], taken["all"]).median, flops["half"] / flops["all"]
    note = f"time {time:.3f}, FLOPs {part:.3f}"
    yield Row("decode_half", (1 - time) / (1 - part), more, note)


class Decoder:
    """Reads given tokens one by one; each call reads TOKENS of them, and the host their answers.

    ``read``: from the next tokens [1, T] to the logits [1, V] of the last. ``wanted_TV``: the
    logits in float32 of the first tokens after the prompt. ``errors``: of its own logits, see the
    module, and ``whole``, that of one pass in half precision over all tokens. Raises NotEqual if
    decoding adds to the error of half precision.
    """

    def __init__(
        self, read: Read, tokens_BT: Tensor, wanted_TV: Tensor, whole: float, at: Sizes
    ) -> None:
        self.read, self.tokens_BT, self.wanted_TV = read, tokens_BT, wanted_TV
        self.answers: list[int] = []
        with torch.inference_mode():
            read(tokens_BT[:, : at.prompt])
        self.place = at.prompt
        found_TV = torch.cat([self._next().float() for _ in range(len(wanted_TV))])
        self.errors = {"step by step": _per_token(found_TV, wanted_TV), "one pass": whole}
        _refuse("the logits of a decoder", self.errors["step by step"], 1.5 * whole + 0.01)

    def _next(self) -> Tensor:
        with torch.inference_mode():
            logits_BV = self.read(self.tokens_BT[:, self.place : self.place + 1])
        self.place += 1
        return logits_BV.clone()

    def __call__(self) -> None:
        for _ in range(TOKENS):
            self.answers.append(int(self._next().argmax()))


def _decoder(model: LanguageModel, tokens_BT: Tensor, at: Sizes) -> Decoder:
    """A decoder of a model in float32, which becomes one in half precision."""
    wanted_TV = _one_pass(model.eval(), tokens_BT, at)
    model.to(precision(at.device)).for_decoding()
    whole = _per_token(_one_pass(model, tokens_BT, at), wanted_TV)
    cache, step = model.new_cache(at.room), None

    def read(tokens_BT: Tensor) -> Tensor:
        nonlocal step
        if tokens_BT.size(1) > 1:
            return model.next_logits(tokens_BT.to(at.device), cache=cache)
        step = step or TokenStep(model, cache, 1, compiled=at.compiled)
        return step(tokens_BT[:, 0].tolist())

    return Decoder(read, tokens_BT, wanted_TV, whole, at)


def _transformers_decoder(wanted_TV: Tensor, tokens_BT: Tensor, at: Sizes) -> Decoder:
    """A decoder of transformers with a static cache, compiled; it has the weights of the plain
    model."""
    (peer,) = peers_of(build(at.plain, device=at.device), extras=False)
    weights_to(peer.model, precision(at.device))
    tokens_BT = tokens_BT.to(at.device)
    whole = _per_token(_one_pass(peer.logits, tokens_BT, at), wanted_TV)
    read = theirs_static(peer, torch.device(at.device), compiled=at.compiled)
    return Decoder(read, tokens_BT, wanted_TV, whole, at)


def _one_pass(logits: Callable[[Tensor], Tensor], tokens_BT: Tensor, at: Sizes) -> Tensor:
    """The logits [T, V] of the tokens after the prompt that are checked, of one pass over all."""
    seen_BT = tokens_BT[:, : at.prompt + at.checked].to(at.device)
    with torch.no_grad():
        return logits(seen_BT)[0, at.prompt :].float()


def _executed(model: LanguageModel, tokens_BT: Tensor, at: Sizes) -> float:
    """The executed FLOPs per token after the prompt, measured without timing."""
    cache = model.new_cache(at.room)
    with torch.no_grad():
        model(tokens_BT[:, : at.prompt].to(at.device), cache=cache)
        with metered(model) as meter:
            for token_B in tokens_BT[:, at.prompt : at.prompt + 4 * TOKENS].unbind(1):
                model(token_B.unsqueeze(1).to(at.device), cache=cache)
    return meter.flops_per_token


def _first_step(step: Step, at: Sizes) -> float:
    """The seconds of the first training step beyond those of a later one: those of compilation."""
    seconds = []
    for _ in range(3):
        before = time.perf_counter()
        step()  # waits for the loss
        if at.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    progress(f"first step: {seconds[0]:.1f} s")
    return seconds[0] - seconds[-1]


def _close(trained: Trainer, batch: Batch, at: Sizes) -> dict[str, float]:
    """The errors of a model as it is trained and of the same model without compilation.

    Raises NotEqual if compilation adds to the error of half precision.
    """
    found = {"eager": _error(trained.model, trained.model, batch, at)}
    if at.compiled:
        found["compiled"] = _error(trained.model, trained.model, batch, at, eager=False)
        _refuse("compiled logits", found["compiled"], 1.5 * found["eager"] + 0.01)
    return found


Logits = Callable[[Tensor], Tensor]


def _error(
    exact: LanguageModel,
    model: torch.nn.Module,
    batch: Batch,
    at: Sizes,
    logits: Logits | None = None,
    *,
    eager: bool = True,
) -> float:
    """The error of the logits of ``model`` in half precision, see the module.

    ``exact``: the model of archdsl with the same weights. Those of the last sequence count, up to
    512 tokens of a plain model. A compiled model reads all sequences as it does in training, and
    with gradients, so that it is not compiled again.
    """
    tokens_BT = batch.tokens_BT.to(at.device)
    own = cast(Logits, partial(_end, exact))
    if logits is not None:
        tokens_BT = tokens_BT[-1:, :512]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        wanted_TV = own(tokens_BT[-1:])
    half = torch.autocast(at.device, torch.bfloat16, enabled=at.device != "cpu")
    given_BT = tokens_BT[-1:] if eager else tokens_BT
    stance = "force_eager" if eager else "default"
    with torch.compiler.set_stance(stance), torch.set_grad_enabled(not eager), half:
        found = (logits or own)(given_BT).detach()
    return _per_token(found.reshape(-1, found.size(-1))[-len(wanted_TV) :], wanted_TV)


def _end(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    """The logits [T, V] of the last 256 tokens at most of the last sequence."""
    model.train()
    return model.readout(model.hidden(model.embedding(tokens_BT))[-1, -256:])


def _per_token(found_TV: Tensor, wanted_TV: Tensor) -> float:
    far_T = (found_TV.float() - wanted_TV.float()).norm(dim=-1) / wanted_TV.float().norm(dim=-1)
    return far_T.median().item()


def _apart(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _refuse(what: str, far: float, tolerance: float) -> None:
    if not far <= tolerance:  # this is also true for NaN
        raise NotEqual(f"not equal: {what}: off by {far:.1e} (tolerance {tolerance:.0e})")


def _ms(taken: Mapping[str, Timing], calls: int = 1) -> dict[str, float]:
    return {name: 1e3 * one.median / calls for name, one in taken.items()}


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise Skipped(f"{package} is not installed")
