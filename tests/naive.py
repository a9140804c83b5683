"""The definitions, one token and one step at a time: what the fast modules must agree with.

A stream is a list with one vector per token, ``pos`` the token's place in the sequence. Nothing
here knows about batches, gathers, masks or filled-up entries.

Shapes: D width, E head size, T tokens.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from archdsl.blocks.exit import ConfidenceSpec, GateSpec, HaltingSpec
from archdsl.blocks.lora import LoraSpec
from archdsl.blocks.modules.attention import Attention
from archdsl.blocks.modules.exit import Confidence, Gate, Halting
from archdsl.blocks.modules.feed_forward import FeedForward
from archdsl.blocks.modules.injection import DiagonalInjection
from archdsl.blocks.modules.layer import Layer
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.blocks.modules.lora import LowRank
from archdsl.blocks.modules.moe import Moe
from archdsl.blocks.modules.norm import Norm
from archdsl.blocks.modules.residual import Gated
from archdsl.blocks.modules.router import Learned, Random
from archdsl.blocks.modules.stack import Stack
from archdsl.blocks.modules.step_encoding import Add, Encoding, Scale
from archdsl.blocks.modules.threshold import Predictor, Threshold
from archdsl.blocks.residual_thinking import DeltaSpec, OverwriteSpec, ThinkingSpec
from archdsl.blocks.rope_scaling import LinearSpec, Llama3Spec, RopeScalingSpec
from archdsl.blocks.router import LearnedSpec, PrefixSpec, RandomSpec
from archdsl.blocks.threshold import PredictorSpec, ThresholdSpec, TopKSpec
from archdsl.lang.spec import BlockSpec
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Block, Context, Primitive
from archdsl.testing import randomise as randomise

Stream = list[Tensor]
Scaled = Callable[[Tensor], Tensor]


class Memory:
    """What passes leave to later ones: position, keys and values, by the place in the body."""

    def __init__(self, kv: str, body: nn.Module) -> None:
        self.kv, self.body = kv, body  # of the pass that runs now
        self.left: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def seen(
        self, module: nn.Module, new: list[tuple[int, Tensor, Tensor]]
    ) -> list[tuple[int, Tensor, Tensor]]:
        place = list(self.body.modules()).index(module)
        before = self.left.get(place, [])
        if self.kv == "shared":
            new = before or new
        if self.kv == "last":
            taken = {p for p, *_ in new}
            new = [*(one for one in before if one[0] not in taken), *new]
        if self.kv == "all":
            new = [*before, *new]
        self.left[place] = new
        return new


Definition = TypeVar("Definition", bound=Callable[..., Any])
_definitions: dict[type, Callable[..., Any]] = {}
heads_of: dict[int, Callable[[Tensor], Tensor]] = {}  # the head of the model that runs


def defines(*defined: type) -> Callable[[Definition], Definition]:
    """Marks the definition of a kind, which for a new kind may stand in its own test.

    Of a block, it is that of the module: ``(module, xs, pos, memory) -> xs``. Of a router, a
    residual or a rotary scaling, it is that of the spec: see `chosen`, `joined` and `slowed`.
    """

    def mark(definition: Definition) -> Definition:
        _definitions.update(dict.fromkeys(defined, definition))
        return definition

    return mark


def definition_of(one: object) -> Callable[..., Any]:
    if type(one) not in _definitions:
        raise NotImplementedError(
            f"state the definition of {type(one).__name__} in the test of its kind, under "
            "@naive.defines"
        )
    return _definitions[type(one)]


def run(module: nn.Module, xs: Stream, pos: list[int], memory: Memory | None) -> Stream:
    return definition_of(module)(module, xs, pos, memory)


@defines(Layer)
def layer(module: Layer, xs: Stream, pos: list[int], memory: Memory | None) -> Stream:
    place = module.norm_place
    for name in ("attention", "ffn"):
        inner, one = getattr(module, name), getattr(module, f"{name}_norm")
        other: Any = getattr(module, f"{name}_norm2", None)
        read = xs if place == "post" else [norm(one, x) for x in xs]
        ys = run(inner, read, pos, memory)
        if place == "sandwich":
            ys = [norm(other, y) for y in ys]
        xs = [x + y for x, y in zip(xs, ys, strict=True)]
        if place in ("post", "pre_post"):
            xs = [norm(one if place == "post" else other, x) for x in xs]
    return xs


@defines(Stack)
def stack(module: Stack, xs: Stream, pos: list[int], memory: Memory | None) -> Stream:
    for inner in module.blocks:
        xs = run(inner, xs, pos, memory)
    return xs


@defines(Norm)
def norms(module: Norm, xs: Stream, *_: object) -> Stream:
    return [norm(module.norm, x) for x in xs]


@defines(FeedForward)
def feed_forwards(module: FeedForward, xs: Stream, *_: object) -> Stream:
    return [feed_forward(module, x) for x in xs]


@defines(Moe)
def experts(module: Moe, xs: Stream, *_: object) -> Stream:
    return [mixture(module, x) for x in xs]


def mixture(module: Moe, x_D: Tensor) -> Tensor:
    """The experts whose score, plus their bias, is among the highest, each with its score."""
    spec = module.spec
    scores = torch.stack([row_D @ x_D for row_D in module.select.weight])
    scores = torch.sigmoid(scores) if spec.gate == "sigmoid" else torch.softmax(scores, 0)
    bias = [0.0] * spec.experts if module.bias_E is None else module.bias_E.tolist()
    worth = [half_of_the_bits(scores[e].item() + bias[e]) for e in range(spec.experts)]
    best = sorted(range(spec.experts), key=lambda e: worth[e], reverse=True)[: spec.top_k]
    whole = sum(scores[e] for e in best) if spec.normalise else 1.0
    every = cast(list[FeedForward], list(module.experts))
    y_D = torch.stack([scores[e] / whole * feed_forward(every[e], x_D) for e in best]).sum(0)
    return y_D if module.shared is None else y_D + feed_forward(module.shared, x_D)


def half_of_the_bits(number: float) -> float:
    """Rounded to 24 of the 53 bits, so that noise does not decide about a choice."""
    part, exponent = math.frexp(number)
    return math.ldexp(round(math.ldexp(part, 24)), exponent - 24)


def block(module: Block, x_BTD: Tensor) -> Tensor:
    """The block on every sequence of a batch."""
    T = x_BTD.size(1)
    return torch.stack(
        [torch.stack(run(module, list(x_TD), list(range(T)), None)) for x_TD in x_BTD]
    )


def model(module: LanguageModel, tokens_BT: Tensor) -> Tensor:
    x_BTD = module.embedding.weight[tokens_BT]
    heads_of[0] = lambda x: module.head.weight @ normed(module.norm, x)
    for inner in module.blocks:
        assert isinstance(inner, Block)
        x_BTD = block(inner, x_BTD)
    return torch.stack(
        [torch.stack([module.head.weight @ normed(module.norm, x) for x in x_TD]) for x_TD in x_BTD]
    )


def normed(module: nn.Module | None, x_D: Tensor) -> Tensor:
    """The token after a norm that a model or a loop may do without."""
    return norm(module, x_D) if isinstance(module, nn.RMSNorm | nn.LayerNorm) else x_D


def norm(module: nn.RMSNorm | nn.LayerNorm, x_D: Tensor) -> Tensor:
    if isinstance(module, nn.RMSNorm):
        assert module.eps is not None
        return x_D / ((x_D**2).sum() / len(x_D) + module.eps).sqrt() * module.weight
    centred = x_D - x_D.sum() / len(x_D)
    variance = (centred**2).sum() / len(x_D)
    return centred / (variance + module.eps).sqrt() * module.weight + module.bias


def feed_forward(module: FeedForward, x_D: Tensor) -> Tensor:
    up = module.up.weight @ x_D
    if module.gate is None:
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    else:
        gate = module.gate.weight @ x_D
        hidden = gate * torch.sigmoid(gate) * up
    return module.down.weight @ hidden


@defines(Attention)
def attention(module: Attention, xs: Stream, pos: list[int], memory: Memory | None) -> Stream:
    own = [
        (p, turned(module, module.k_norm, module.k, x, p), heads(module, module.v, x))
        for x, p in zip(xs, pos, strict=True)
    ]
    seen = own if memory is None else memory.seen(module, own)
    out = []
    for x, p in zip(xs, pos, strict=True):
        query = turned(module, module.q_norm, module.q, x, p)
        near = [
            (keys, values)
            for s, keys, values in seen
            if s <= p and (module.window is None or p - s < module.window)
        ]
        out.append(module.o.weight @ torch.cat([read(h, query, near) for h in range(len(query))]))
    return out


def read(head: int, query_HE: Tensor, near: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What one head takes from the tokens it sees."""
    queries_per_kv = len(query_HE) // len(near[0][0])
    g, E = head // queries_per_kv, query_HE.size(1)
    scores = torch.stack([query_HE[head] @ keys[g] / math.sqrt(E) for keys, _ in near])
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    return torch.stack([w * values[g] for w, (_, values) in zip(weights, near, strict=True)]).sum(0)


def heads(module: Attention, matrix: nn.Linear, x_D: Tensor) -> Tensor:
    return (matrix.weight @ x_D).view(-1, module.head_size)


def turned(module: Attention, qk_norm: nn.Module, matrix: nn.Linear, x_D: Tensor, p: int) -> Tensor:
    """Heads of queries or keys, normed and rotated by the token's place in the sequence."""
    x_HE = heads(module, matrix, x_D)
    if isinstance(qk_norm, nn.RMSNorm):
        x_HE = torch.stack([norm(qk_norm, x_E) for x_E in x_HE])
    if module.theta is None:
        return x_HE
    half = module.head_size // 2
    low, high = [], []
    for i in range(half):
        angle = p * slowed(module.theta ** (-2 * i / module.head_size), module.scaling)
        low.append(x_HE[:, i] * math.cos(angle) - x_HE[:, i + half] * math.sin(angle))
        high.append(x_HE[:, i + half] * math.cos(angle) + x_HE[:, i] * math.sin(angle))
    return torch.stack(low + high, 1)


def slowed(freq: float, scaling: RopeScalingSpec | None) -> float:
    """The angle from one token to the next, in a model whose context was extended."""
    return freq if scaling is None else definition_of(scaling)(scaling, freq)


@defines(LinearSpec)
def slowed_linearly(scaling: LinearSpec, freq: float) -> float:
    return freq / scaling.factor


@defines(Llama3Spec)
def slowed_as_in_llama3(scaling: Llama3Spec, freq: float) -> float:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context * freq / (2 * math.pi)
    if turns >= high:
        return freq
    if turns <= low:
        return freq / scaling.factor
    kept = (turns - low) / (high - low)
    return (1 - kept) * freq / scaling.factor + kept * freq


@defines(BodyLoop)
def loop(module: BodyLoop, xs: Stream, pos: list[int], *_: object) -> Stream:
    """Y(0) = f(X) * phi(0); then step by step what the residual says for those selected."""
    spec, start = module.spec, xs
    xs = first_states(module, xs, pos)
    memory = None if spec.kv == "own" else Memory(spec.kv, module.bodies[0])
    left = set(range(len(xs)))  # who may still be selected, where the router is nested
    learned = 0  # routed steps that select, so far
    among = 1.0  # the share of the tokens that a nested router has left
    past: list[list[Tensor]] = [[] for _ in xs]  # the states after each pass that a token took
    for step in range(spec.steps):
        capacity, alpha = 1.0, 1.0
        if spec.router is not None and step >= spec.full_steps:
            capacity = per_step(spec.router.capacity, step - spec.full_steps)
            alpha = per_step(spec.router.alpha, step - spec.full_steps)
        gates: dict[int, Tensor | None] = dict.fromkeys(range(len(xs)))
        if capacity < 1:
            gates = {
                t: alpha * gate
                for t, gate in chosen(module, xs, pos, (capacity, among), learned, left)
            }
            learned += 1
            if spec.router is not None and spec.router.nested:
                left, among = set(gates), capacity
        if spec.exit is not None and step:
            gates = {t: None for t in gates if len(past[t]) == step and goes_on(module, past[t])}
        if spec.exit is not None and not gates:
            break
        into = [body_input(module, xs[t], start[t], step) for t in gates]
        body = module.bodies[step if spec.parameters == "per_step" else 0]
        if memory is not None:
            memory.body = body
        with adapted(module, step):
            ys = dict(zip(gates, run(body, into, [pos[t] for t in gates], memory), strict=True))
        whole = step == 0 and capacity == 1
        xs = [
            scaled(module, ys[t], step)
            if whole
            else joined(module, x, ys.get(t), gates.get(t), step)
            for t, x in enumerate(xs)
        ]
        xs = [normed(module.norm, x) if t in gates else x for t, x in enumerate(xs)]
        for t in gates:
            past[t].append(xs[t])
    if isinstance(module.exit, Halting):
        return [halted(module.exit, states, spec.steps) for states in past]
    return xs


@contextmanager
def adapted(module: BodyLoop, step: int) -> Iterator[None]:
    """Within the block, the matrices of the body are W + alpha / rank * B A, those of the pass."""
    differences = list(cast(nn.ModuleList, module.lora.steps[step])) if module.lora else []
    matrices = [one for one in module.bodies[0].modules() if isinstance(one, nn.Linear)]
    shared = {one: one.weight for one in matrices}
    for one, low in zip(matrices, differences, strict=False):
        assert isinstance(low, LowRank)
        assert isinstance(module.spec.parameters, LoraSpec)
        alpha, rank = module.spec.parameters.alpha, len(low.a.weight)
        del one.weight
        one.weight = shared[one] + alpha / rank * low.b.weight @ low.a.weight
    yield
    for one, weight in shared.items():
        del one.weight
        one.weight = weight


def goes_on(module: BodyLoop, states: Stream) -> bool:
    """Whether a token that has these states after its passes takes the next one."""
    return definition_of(module.spec.exit)(module.spec.exit, module.exit, states)


@defines(GateSpec)
def goes_on_through_gate(spec: GateSpec, gate: Gate, states: Stream) -> bool:
    stay = 1.0
    for x in states:
        stay *= 1 - torch.sigmoid(gate.score.weight[0] @ x + gate.score.bias[0]).item()
    return spec.threshold == 1 or 1 - stay < spec.threshold


@defines(HaltingSpec)
def goes_on_unhalted(spec: HaltingSpec, halting: Halting, states: Stream) -> bool:
    return torch.stack(halting_numbers(halting, states)).sum().item() < spec.threshold


def halting_numbers(halting: Halting, states: Stream) -> Stream:
    return [torch.sigmoid(halting.score.weight[0] @ x + halting.score.bias[0]) for x in states]


def halted(halting: Halting, states: Stream, steps: int) -> Tensor:
    """The mean of the states: each weighs its number, the last what is left to 1."""
    weights = halting_numbers(halting, states[:-1])
    last = 1 - sum(weights, torch.zeros((), dtype=states[0].dtype))
    return torch.stack([w * x for w, x in zip([*weights, last], states, strict=True)]).sum(0)


@defines(ConfidenceSpec)
def goes_on_unsettled(spec: ConfidenceSpec, confidence: Confidence, states: Stream) -> bool:
    logps = [heads_of[0](x).log_softmax(-1) for x in states[-2:]]
    if spec.measure == "entropy":
        return -(logps[-1].exp() @ logps[-1]).item() >= spec.threshold
    if len(logps) == 1:
        return True
    return (logps[1].exp() @ (logps[1] - logps[0])).item() >= spec.threshold


def per_step(values: Sequence[float], step: int) -> float:
    return values[step] if len(values) > 1 else values[0]


def first_states(module: BodyLoop, xs: Stream, pos: list[int]) -> Stream:
    """What the first pass reads of each token, in evaluation."""
    if module.spec.start == "embedding":
        return xs
    if module.spec.start == "zeros":
        return [torch.zeros_like(x) for x in xs]
    std = module.spec.start_std
    return [
        torch.tensor([std * noise(p, channel) for channel in range(len(x))], dtype=x.dtype)
        for x, p in zip(xs, pos, strict=True)
    ]


def noise(position: int, channel: int) -> float:
    """From N(0, 1), by Box and Muller."""
    size, angle = hashed(position, 2 * channel), hashed(position, 2 * channel + 1)
    return math.sqrt(-2 * math.log(1 - size)) * math.cos(2 * math.pi * angle)


def hashed(position: int, stream: int) -> float:
    h = (position + 1) * 0x9E3779B1 + (stream + 1) * 0x85EBCA77
    for factor in (0x7FEB352D, 0x6C8E9CF5):
        h = ((h ^ h >> 15) & 0x7FFFFFFF) * factor
    return ((h ^ h >> 16) & 0xFFFFFF) / 2**24


def body_input(module: BodyLoop, x: Tensor, start: Tensor, step: int) -> Tensor:
    if step > 0 or module.spec.start != "embedding":
        x = injected(module, x, start)
    return definition_of(module.encoding)(module.encoding, x, step, False)


def injected(module: BodyLoop, x: Tensor, start: Tensor) -> Tensor:
    match module.spec.injection, module.inject:
        case "add", None:
            return x + start
        case "linear", nn.Linear() as inject:
            return inject.weight @ torch.cat([x, start])
        case "diagonal", DiagonalInjection() as inject:
            d = torch.log(1 + torch.exp(inject.log_d_D))
            return torch.exp(-d * torch.exp(inject.log_a_D)) * x + d * (inject.input_DD @ start)
        case _:
            return x


def scaled(module: BodyLoop, y: Tensor, step: int) -> Tensor:
    return definition_of(module.encoding)(module.encoding, y, step, True)


@defines(Encoding)
def no_encoding(encoding: Encoding, x: Tensor, step: int, after: bool) -> Tensor:
    """What an encoding makes of the body's input; ``after``: of its result."""
    return x


@defines(Scale)
def scale_encoding(encoding: Scale, x: Tensor, step: int, after: bool) -> Tensor:
    return x * encoding.phi_SD[step] if after else x


@defines(Add)
def add_encoding(encoding: Add, x: Tensor, step: int, after: bool) -> Tensor:
    return x if after else x + encoding.e_SD[step]


def joined(module: BodyLoop, x: Tensor, y: Tensor | None, gate: Tensor | None, step: int) -> Tensor:
    """The new value of a token that was ``x``; ``y`` is None where it was not selected."""
    gate = torch.ones((), dtype=x.dtype) if gate is None else gate
    residual = module.residual or module.spec.residual
    return definition_of(residual)(residual, x, y, gate, lambda one: scaled(module, one, step))


@defines(ThinkingSpec)
def thinking(
    residual: ThinkingSpec, x: Tensor, y: Tensor | None, gate: Tensor, scale: Scaled
) -> Tensor:
    if y is not None:
        return x + scale(gate * y)
    return x + scale(x) if residual.unselected == "literal" else x


@defines(OverwriteSpec)
def overwrite(
    residual: OverwriteSpec, x: Tensor, y: Tensor | None, gate: Tensor, scale: Scaled
) -> Tensor:
    return x if y is None else scale(gate * y)


@defines(DeltaSpec)
def delta(residual: DeltaSpec, x: Tensor, y: Tensor | None, gate: Tensor, scale: Scaled) -> Tensor:
    return x if y is None else x + scale(gate * (y - x))


@defines(Gated)
def gated(residual: Gated, x: Tensor, y: Tensor | None, gate: Tensor, scale: Scaled) -> Tensor:
    return x if y is None else x + scale(gate * torch.sigmoid(residual.gate_D) * (y - x))


class Question(NamedTuple):
    """What a router is asked: which tokens of ``xs`` take a routed step.

    ``left``: those that may still be selected; ``among``: the share of the tokens that they are.
    """

    xs: Stream
    pos: list[int]
    capacity: float
    among: float
    row: int
    left: set[int]


def chosen(
    module: BodyLoop,
    xs: Stream,
    pos: list[int],
    share: tuple[float, float],
    row: int,
    left: set[int],
) -> list[tuple[int, Tensor]]:
    """The selected tokens, first to last, with their weights."""
    question = Question(xs, pos, *share, row, left)
    return definition_of(module.spec.router)(module.spec.router, module.router, question)


@defines(RandomSpec)
def random(spec: RandomSpec, router: Random, asked: Question) -> list[tuple[int, Tensor]]:
    scores = [
        router.scores(x.view(1, 1, -1), asked.row, Context(pos_BT=torch.tensor([[p]])))[0, 0]
        for x, p in zip(asked.xs, asked.pos, strict=True)
    ]
    picked = within_budget(prefix(scores, asked.capacity, asked.left), asked.capacity, len(scores))
    return [(t, torch.ones_like(scores[t])) for t in picked]


@defines(PrefixSpec, TopKSpec, PredictorSpec, ThresholdSpec)
def learned(spec: LearnedSpec, router: Learned, asked: Question) -> list[tuple[int, Tensor]]:
    scores = [router.weight_RD[asked.row] @ x for x in asked.xs]
    squash = torch.sigmoid if spec.gate == "sigmoid" else torch.tanh
    capacity, left = asked.capacity, asked.left
    match spec:
        case TopKSpec() if router.leaks:
            picked = top_k(scores, capacity, left)
        case PrefixSpec():
            picked = within_budget(prefix(scores, capacity, left), capacity, len(scores))
        case PredictorSpec():
            assert isinstance(router, Predictor)
            odds = [router.predict_RD[asked.row] @ x + router.bias_R[asked.row] for x in asked.xs]
            picked = within_budget([t for t in left if odds[t] > 0], capacity, len(scores))
        case _:
            assert isinstance(router, Threshold)
            least = quantile(router.quantiles_RQ[asked.row], 1 - capacity / asked.among)
            wanted = [t for t in left if scores[t] >= least]
            picked = within_budget(wanted, capacity, len(scores))
    return [(t, squash(scores[t])) for t in picked]


def quantile(table_Q: Tensor, level: float) -> float:
    return float(np.interp(level, np.linspace(0, 1, len(table_Q)), table_Q.numpy()))


def top_k(scores: Sequence[Tensor], capacity: float, left: set[int]) -> list[int]:
    """The best share of the sequence, among those that are left."""
    best = sorted(left, key=lambda t: scores[t].item(), reverse=True)
    return sorted(best[: rounded(capacity * len(scores))])


def prefix(scores: Sequence[Tensor], capacity: float, left: set[int]) -> list[int]:
    """What a decoder does: it sees one score after the other and keeps them sorted.

    Equal scores: the later token is taken to rank above the earlier one.
    """
    ranked: list[float] = []
    wanted: list[int] = []
    for t, score in enumerate(scores):
        if t not in left:
            continue  # a token that was left out ranks below everything
        value = score.item()
        better = len(ranked) - bisect.bisect_right(ranked, value)
        bisect.insort(ranked, value)
        if better < rounded(capacity * (t + 1)):
            wanted.append(t)
    return wanted


def within_budget(wanted: Collection[int], capacity: float, tokens: int) -> list[int]:
    """Those of the wanted for which there was room when their turn came."""
    taken: list[int] = []
    for t in range(tokens):
        if t in wanted and len(taken) < rounded(capacity * (t + 1)):
            taken.append(t)
    return taken


def rounded(share: float) -> int:
    """To the nearest whole number, half upwards, at least one."""
    return max(1, math.floor(share + 0.5))


def agree(got: Tensor, want: Tensor, inputs: Sequence[Tensor], *, tolerance: float = 1e-9) -> None:
    """Equal values, and equal gradients of a loss that weighs every output differently."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    weigh = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    grads = [
        torch.autograd.grad((y * weigh).sum(), inputs, allow_unused=True, materialize_grads=True)
        for y in (got, want)
    ]
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


def initialised(module: Block) -> Block:
    """With what `randomise` leaves alone, such as a router's quantiles."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Primitive):
                part.reset(torch.Generator().manual_seed(0), 1)
    return module


def stream(batch: int, tokens: int, dim: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(batch, tokens, dim, generator=rng, dtype=torch.float64)
    return x_BTD.requires_grad_()


def agrees(spec: BlockSpec, dim: int, tokens: int = 7, batch: int = 2, seed: int = 0) -> None:
    """The block of ``spec`` does what its definition says, and so do its gradients."""
    module = initialised(spec.build(dim)).eval()
    randomise(module, seed)
    x_BTD = stream(batch, tokens, dim, seed + 1)
    agree(module(x_BTD, Context()), block(module, x_BTD), [x_BTD, *module.parameters()])
