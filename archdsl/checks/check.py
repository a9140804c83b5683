"""Checks that a model is causal, and that its outputs do not depend on how its tokens arrive.

The whole model is checked, and each of its blocks alone. That is done in float64, where outputs
that should be equal differ by rounding only. A spec is checked with random weights far from their
initial values, and at smaller sizes if it is large. A trained model is checked with its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import nn

from archdsl.checks.invariants import (
    LEAKS,
    MEASURES,
    VANISHED,
    Gap,
    Kind,
    Plan,
    Subject,
    as_trained,
    worst,
)
from archdsl.checks.localise import WHOLE, Place, earlier, leaks, origins_of, places
from archdsl.costs.receipt import sequence_cost
from archdsl.lang.load import Source, as_spec
from archdsl.lang.spec import ModelSpec, Part, Sizes, children, to_tree
from archdsl.lang.strict import Strict
from archdsl.model.build import build, meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.nn.loop import Loop, Router

Mark = Literal["PASS", "LEAK", "FAIL"]

LARGEST = Sizes(dim=48, context=32, vocab_size=97, head_size=8, repeat=1)
WORK = 2e8  # forward FLOPs of a pass over changed rows
HEAVY = 4e9  # of a pass over one row; a heavier model is tried once, with half the tokens
SHRINK = (1.0, 0.5, 0.25, 0.125)  # factors of random weights, tried until nothing overflows
CAPACITY = 0.4  # that the dial is turned to
DIALLED = "model, dialled"

SAID: dict[Kind, str] = {
    "change": "changing a later token moves earlier outputs",
    "gradient": "earlier outputs have a gradient with respect to later inputs",
    "decoding": "decoding token by token differs from one pass",
    "prefill": "a prefill in chunks differs from one pass",
    "padding": "padding changes the outputs of other tokens",
}


class Row(Strict):
    """The results at one place of the model.

    ``differences``: for each check the largest difference, as a share of the largest output; None:
    not finite. ``mark``: LEAK where only later tokens are seen, FAIL where another check fails.
    """

    place: str
    kind: str
    differences: dict[Kind, float | None]
    mark: Mark


class Fault(Strict):
    """A check that fails, and the place where the fault is.

    ``step``: the first pass of a loop in which it appears, counted from 1. ``router``: the kind of
    the loop's router. ``difference``: the largest difference of outputs; None: not finite; 0: no
    output differed, but the router looks at later tokens. ``largest``: the largest output.
    """

    place: str
    step: int | None = None
    router: str | None = None
    check: Kind
    difference: float | None
    largest: float | None

    def __str__(self) -> str:
        where = self.place + (f", step {self.step}" if self.step else "")
        where += f" (router {self.router})" if self.router else ""
        if self.difference is None or self.largest is None:
            return f"{where}: its numbers overflow or are none ({self.check})"
        if self.difference == 0:
            return f"{where}: looks at later tokens, though none moved an output here"
        size = f"{self.difference:.3g}, where the largest is {self.largest:.3g}"
        return f"{where}: {SAID[self.check]} by up to {size}"


class Report(Strict):
    """The results of `check`.

    ``setup``: what was tried, in a sentence. ``leaking_pass``: the largest difference of logits
    between a pass with sight of later tokens and decoding. ``notes``: remarks for the user.
    """

    name: str
    setup: str
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    leaking_pass: float | None
    notes: tuple[str, ...]

    @property
    def leaks(self) -> tuple[Fault, ...]:
        """The faults by which later tokens are seen."""
        return tuple(fault for fault in self.faults if fault.check in LEAKS)

    @property
    def passed(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if self.passed:
            return f"{self.name} is causal, and its outputs are the same however its tokens arrive"
        said = ["sees later tokens"] if self.leaks else []
        if len(self.faults) > len(self.leaks):
            said.append("does not give the same outputs however its tokens arrive")
        return f"{self.name} {' and '.join(said)}"


Key = tuple[str, Kind]  # place in the spec, and check


class DrawResult(NamedTuple):
    """The results for one set of random inputs.

    ``gaps``: by place and check. ``origins``: the places where the failing checks originate, with
    the step where the place is a loop.
    """

    gaps: dict[Key, Gap]
    origins: dict[Key, int | None]
    leaking_pass: Gap | None

    @property
    def overflows(self) -> bool:
        """Whether some outputs are not finite."""
        return any(gap.share == math.inf for gap in self.gaps.values())


def check(subject: Source | LanguageModel, *, seeds: int = 3) -> Report:
    """Checks a spec or a model with ``seeds`` sets of random inputs, and of weights for a spec.

    ``subject``: a model, a spec, or anything that `archdsl.load` takes. A model is checked at the
    setting of its compute dial, and left unchanged. A large one is checked with one set of inputs.
    Raises SpecError if the spec is wrong.

    >>> import archdsl
    >>> archdsl.check({"extends": "tiny", "context": 8}, seeds=1).verdict
    'tiny is causal, and its outputs are the same however its tokens arrive'
    """
    if not isinstance(subject, nn.Module):
        subject = as_spec(subject)
        spec = _reduced(subject)
        model = meta_model(spec)
        plans = _plans(spec, seeds)
        results = [_on_random_weights(spec, plan) for plan in plans]
        weights = "random weights"
    else:
        model = _in_float64(subject)
        plans = _plans(model.spec, seeds)
        results = [tried(model, plan) for plan in plans]
        weights = "its own weights"
    return _report(model, _setup(subject, plans, weights), results)


def _reduced(spec: ModelSpec) -> ModelSpec:
    """The same structure, at sizes that can be checked in seconds."""
    if spec.dim <= LARGEST.dim and spec.context <= LARGEST.context:
        return spec
    sizes = LARGEST._replace(
        dim=min(spec.dim, LARGEST.dim),
        context=min(spec.context, LARGEST.context),
        vocab_size=min(spec.vocab_size, LARGEST.vocab_size),
    )
    return spec.resized(sizes)


def _plans(spec: ModelSpec, seeds: int) -> list[Plan]:
    tokens = min(spec.context, LARGEST.context)
    if sequence_cost(spec, tokens=tokens).flops > HEAVY:
        tokens, seeds = max(1, tokens // 2), 1
    rows = max(2, int(WORK / sequence_cost(spec, tokens=tokens).flops))
    return [Plan(tokens, min(tokens - 1, rows), seed) for seed in range(seeds)]


def _on_random_weights(spec: ModelSpec, plan: Plan) -> DrawResult:
    for share in SHRINK:
        model = build(spec, seed=plan.seed, dtype=torch.float64).eval().requires_grad_(False)
        _scatter(model, plan.rng(1), share)
        result = tried(model, plan)
        if not result.overflows:
            break
    return result


@torch.no_grad()
def _scatter(model: LanguageModel, rng: torch.Generator, share: float) -> None:
    """Moves every parameter away from its initial value, such as 0 or 1, which can hide faults."""
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            fan_in = weight.size(-1) if isinstance(module, nn.Linear | Router) else 1
            noise = torch.randn(weight.shape, generator=rng, dtype=weight.dtype)
            weight.add_(noise, alpha=0.5 * fan_in**-0.5).mul_(share)


def _in_float64(model: LanguageModel) -> LanguageModel:
    """A copy of the model in float64, at the same setting of the compute dial."""
    twin = build(model.spec, dtype=torch.float64).eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    for loop, other in zip(model.loops, twin.loops, strict=True):
        other.passes = loop.passes
    return twin


def tried(model: LanguageModel, plan: Plan) -> DrawResult:
    """Runs every check on the model and on each of its blocks alone, as ``plan`` says."""
    whole = Subject(WHOLE, model)
    subjects = [whole, *(Subject(one.path, model, one.block) for one in places(model))]
    gaps: dict[Key, Gap] = {}
    origins: dict[Key, int | None] = {}
    for kind, measure in MEASURES.items():
        failing: list[Subject] = []
        for subject in subjects:
            found, key = measure(subject, plan), (subject.place, kind)
            gaps[key] = worst([found, gaps.get(key, found)])
            if not found.holds:
                failing.append(subject)
        for place, step in origins_of(failing, kind, plan):
            origins[place, kind] = earlier(step, origins.get((place, kind)))
    leaking_pass = as_trained(whole, plan) if model.leaks else None
    return DrawResult(gaps | _dialled(model, plan), origins, leaking_pass)


def _dialled(model: LanguageModel, plan: Plan) -> dict[Key, Gap]:
    """The whole model at another capacity, with one step more where a loop can run it."""
    before = [loop.passes for loop in model.loops]
    try:
        for loop in model.loops:
            loop.dial(CAPACITY, loop.most_steps or loop.steps + 1)
        whole = Subject(WHOLE, model)
        kinds = MEASURES.items() if model.loops else ()
        return {(DIALLED, kind): measure(whole, plan) for kind, measure in kinds}
    finally:
        for loop, passes in zip(model.loops, before, strict=True):
            loop.passes = passes


def _setup(subject: ModelSpec | LanguageModel, plans: list[Plan], weights: str) -> str:
    spec, tokens = (subject if isinstance(subject, ModelSpec) else subject.spec), plans[0].tokens
    dim = min(spec.dim, LARGEST.dim) if isinstance(subject, ModelSpec) else spec.dim
    width = f"width {dim}" + (f" for {spec.dim:,}" if dim < spec.dim else "")
    cut = f"{tokens} tokens" + (f" for {spec.context:,}" if tokens < spec.context else "")
    draws = f"{len(plans)} draw{'s' if len(plans) > 1 else ''}"
    return (
        f"in float64, {weights}, {width}, {cut}, {draws} with {plans[0].places} changed places each"
    )


def _report(model: LanguageModel, setup: str, results: list[DrawResult]) -> Report:
    gaps = {key: worst([result.gaps[key] for result in results]) for key in results[0].gaps}
    origins: dict[Key, int | None] = {}
    for result in results:
        for key, step in result.origins.items():
            origins[key] = earlier(step, origins.get(key))
    at = {place.path: place for place in places(model)}
    apart = [result.leaking_pass for result in results if result.leaking_pass]
    leaking_pass = _finite(worst(apart).difference) if apart else None
    return Report(
        name=model.spec.name,
        setup=setup,
        rows=tuple(_rows(gaps, at)),
        faults=tuple(_faults(gaps, origins, at)),
        leaking_pass=leaking_pass,
        notes=tuple(_notes(gaps, at, leaking_pass)),
    )


def _rows(gaps: dict[Key, Gap], at: dict[str, Place]) -> Iterator[Row]:
    for path in dict.fromkeys(path for path, _ in gaps):
        failed = [kind for kind in MEASURES if not gaps[path, kind].holds]
        mark: Mark = "PASS"
        if failed:
            mark = "LEAK" if set(failed) <= set(LEAKS) else "FAIL"
        yield Row(
            place=path,
            kind=_kind(at[path].spec) if path in at else "",
            differences={kind: _finite(gaps[path, kind].share) for kind in MEASURES},
            mark=mark,
        )


def _faults(
    gaps: dict[Key, Gap], origins: dict[Key, int | None], at: dict[str, Place]
) -> Iterator[Fault]:
    in_blocks = any(path != WHOLE for path, _ in origins)
    for (path, kind), step in origins.items():
        if path == WHOLE and in_blocks:  # other inputs have shown which block it comes from
            continue
        if kind != "gradient" or (path, "change") not in origins:
            yield _fault(path, kind, gaps[path, kind], step, at)
    leaking = [path for path, one in at.items() if isinstance(one.block, Loop) and leaks(one.block)]
    for (path, kind), gap in gaps.items():
        explained = kind in LEAKS and leaking
        if path == DIALLED and gaps[WHOLE, kind].holds and not gap.holds and not explained:
            yield _fault(path, kind, gap, None, at)
    traced = {path for path, kind in origins if kind in LEAKS}
    for path in leaking:
        if path not in traced:
            yield _fault(path, "change", Gap(0.0, 0.0), None, at)


def _fault(path: str, kind: Kind, gap: Gap, step: int | None, at: dict[str, Place]) -> Fault:
    return Fault(
        place=path,
        step=step,
        router=_router_kind(at[path].spec) if path in at else None,
        check=kind,
        difference=_finite(gap.difference),
        largest=_finite(gap.largest),
    )


def _notes(gaps: dict[Key, Gap], at: dict[str, Place], leaking_pass: float | None) -> Iterator[str]:
    if leaking_pass is not None:
        yield (
            "decoding always chooses causally: its logits are up to "
            f"{leaking_pass:.3g} away from those of one pass with sight of later tokens"
        )
    for path, place in at.items():
        router = place.block.router if isinstance(place.block, Loop) else None
        if router is not None and router.sees_later_tokens_in_training:
            yield f"{path}: chooses with sight of later tokens while it trains, and never else"
    if any(path == DIALLED for path, _ in gaps):
        yield f"dialled: capacity {CAPACITY:g}, one step more where weights allow"
    for path in dict.fromkeys(path for path, _ in gaps):
        if gaps[path, "decoding"].largest <= VANISHED:
            yield f"{path}: its outputs vanish, so nothing is known about them"


def _router_kind(part: Part) -> str | None:
    routers = (child for _, child in children(part) if child.family == "router")
    return next(map(_kind, routers), None)


def _kind(part: Part) -> str:
    return str(to_tree(part)["kind"])


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
