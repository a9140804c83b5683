"""Loop: a body applied several times, by default with the same weights: thinking steps.

Inner Thinking Transformer (Chen et al. 2502.13842), with R, f and phi as there:

    Y(0) = f(X) * phi(0)                            the first step takes all tokens
    Y(t) = join(Y(t-1), w(t) * f(Y(t-1)), phi(t))   further steps take those the router selects

The slots make it other models: no router and `overwrite` is a plain loop; no full step, one routed
one and `delta` is Mixture-of-Depths (Raposo et al. 2404.02258); a nested router over a stack is
Mixture-of-Recursions (Bae et al. 2507.10524); an input injection is Huginn's (Geiping et al.
2502.05171); `add` encodings make a Universal Transformer (Dehghani et al. 1807.03819).

Shapes: B batch, T tokens, K selected tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, WithJsonSchema
from torch import Tensor, nn

from archdsl.block import Block, Context
from archdsl.blocks.dial import Pass, plan
from archdsl.blocks.residual_thinking import (
    DeltaSpec,
    OverwriteSpec,
    ResidualSpec,
    ThinkingSpec,
)
from archdsl.blocks.router import Choice, RouterSpec, Step
from archdsl.blocks.step_encoding import Encoding, EncodingSpec
from archdsl.cost import Cost, Scope, linear
from archdsl.spec import AnyBlock, BlockSpec, Path, at_step, slot, walk

LAYER = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}


class LoopSpec(BlockSpec):
    """``steps`` passes through ``body``; after ``full_steps`` of them a router selects tokens."""

    example: ClassVar = {
        "kind": "loop",
        "steps": 3,
        "router": {"kind": "prefix", "capacity": [0.75, 0.5]},
        "residual": {"kind": "thinking"},
        "encoding": {"kind": "scale"},
        "body": LAYER,
    }

    kind: Literal["loop"] = "loop"
    steps: int = Field(2, ge=1, le=64, description="passes through the body, full ones included")
    full_steps: int = Field(1, ge=0, le=64, description="first passes, which take every token")
    router: Annotated[
        SerializeAsAny[RouterSpec] | None,
        slot("router"),
        WithJsonSchema({"x-family": "router"}),
    ] = Field(None, description="selects the tokens of further passes; default: all of them")
    residual: Annotated[
        SerializeAsAny[ResidualSpec],
        slot("residual"),
        WithJsonSchema({"x-family": "residual"}),
    ] = Field(OverwriteSpec(), description="how a pass joins the ones before it")
    encoding: Annotated[
        SerializeAsAny[EncodingSpec] | None,
        slot("encoding"),
        WithJsonSchema({"x-family": "encoding"}),
    ] = Field(None, description="how the body can tell the passes apart; default: it cannot")
    kv: Literal["own", "shared"] = Field(
        "own",
        description="own: the tokens of a pass attend to each other; shared: to the keys and "
        "values of all tokens of the first pass, which costs no further projection",
    )
    parameters: Literal["shared", "per_step"] = Field(
        "shared", description="per_step: each pass has weights of its own"
    )
    injection: Literal["add", "linear"] | None = Field(
        None, description="feed the loop's input again to further passes, added or by a matrix"
    )
    body: AnyBlock

    @property
    def nodes(self) -> int:
        return 1 + self.body.nodes * self.steps

    @property
    def is_body(self) -> bool:
        """One pass of every token: nothing to choose, to join or to tell apart."""
        return self.rows() == [None]

    def rows(self) -> list[int | None]:
        """For each pass, which step of the router selects its tokens; None: every token."""
        routed = [None if t < self.full_steps else t - self.full_steps for t in range(self.steps)]
        if self.router is None:
            return [None] * self.steps
        shares = self.router.capacity
        return [None if r is None or shares[min(r, len(shares) - 1)] == 1 else r for r in routed]

    def misfits(self, dim: int) -> Iterator[tuple[Path, str]]:
        if self.router is not None:
            further = max(0, self.steps - self.full_steps)
            for name in ("capacity", "alpha"):
                given = len(getattr(self.router, name))
                if 1 < given < further:
                    yield (
                        ("router", name),
                        f"needs one value, or one for each of the {further} passes after the "
                        f"first {self.full_steps}; got {given}",
                    )
        if self.kv == "shared":
            yield from self._sharing_misfits()

    def _sharing_misfits(self) -> Iterator[tuple[Path, str]]:
        if self.full_steps < 1:
            yield ("kv",), "shared needs a first pass over all tokens: full_steps of at least 1"
        if self.parameters == "per_step":
            yield ("kv",), "shared leaves per_step keys and values unused: parameters: shared"
        if any(isinstance(part, LoopSpec) for _, part in walk(self.body)) or isinstance(
            self.body, LoopSpec
        ):
            yield ("kv",), "shared is not defined for a loop inside the body: kv: own"

    def canonical(self, dim: int) -> BlockSpec:
        loop = super().canonical(dim)
        assert isinstance(loop, LoopSpec)
        if loop.is_body:
            return loop.body
        further = loop.steps - loop.full_steps
        update: dict[str, object] = {}
        if loop.router is None or all(row is None for row in loop.rows()):
            update |= {"router": None, "full_steps": 1}
            if isinstance(loop.residual, ThinkingSpec):
                update["residual"] = ThinkingSpec()
        else:
            update["router"] = loop.router.model_copy(
                update={
                    name: _shortest(getattr(loop.router, name), further)
                    for name in ("capacity", "alpha")
                }
            )
        if loop.encoding is None and isinstance(loop.residual, DeltaSpec) and not loop.is_gated:
            update["residual"] = OverwriteSpec()  # y and x + (y - x) are one
        return loop.model_copy(update=update)

    @property
    def is_gated(self) -> bool:
        """Whether a pass weighs its results, token by token or by a constant."""
        if self.router is None or all(row is None for row in self.rows()):
            return False
        return self.router.learned or set(self.router.alpha) != {1.0}

    def build(self, dim: int) -> Block:
        return self.body.build(dim) if self.is_body else Loop(self, dim)

    def cost(self, scope: Scope) -> Cost:
        full = self.body.cost(scope)
        if self.is_body:
            return full
        rows = self.rows()
        runs = [self._scope(scope, step, row) for step, row in enumerate(rows)]
        body = full.runs(0)
        for at in dict.fromkeys(runs):
            body = body.plus((full if at == scope else self.body.cost(at)).runs(runs.count(at)))
        if self.parameters == "per_step":
            body = body.weights(self.steps)
        return scope.together({"body": body} | self._slots(scope, rows, runs))

    def _scope(self, scope: Scope, step: int, row: int | None) -> Scope:
        """What a pass runs on."""
        shared = self.kv == "shared" and step > 0
        if row is None:
            return scope._replace(projects=False) if shared else scope
        return scope.routed(self._tokens(scope, row), shared)

    def _tokens(self, scope: Scope, row: int) -> int:
        assert self.router is not None
        expected = self.router.tokens(scope.tokens, row)
        return {"none": 0, "expected": expected, "all": scope.tokens}[scope.routing]

    def _slots(self, scope: Scope, rows: list[int | None], runs: list[Scope]) -> dict[str, Cost]:
        slots: dict[str, Cost] = {}
        routed = [row for row in rows if row is not None]
        if self.router is not None and routed:
            # a step that the dial skips asks no router
            choices = sum(at_step(self.router.capacity, row) > 0 for row in routed)
            slots["router"] = self.router.cost(scope.dim, scope.tokens, choices)
        if self.encoding is not None:
            slots["encoding"] = self.encoding.cost(scope.dim, self.steps)
        if self.injection == "linear":
            tokens = sum(at.tokens for at in runs[1:])
            slots["injection"] = linear(tokens, (2 * scope.dim, scope.dim))
        return slots


def _shortest(values: tuple[float, ...], used: int) -> tuple[float, ...]:
    """A per-step value without what no pass uses, as one number if it never changes."""
    values = values[:used]
    return values[:1] if len(set(values)) == 1 else values


class Loop(Block):
    def __init__(self, spec: LoopSpec, dim: int) -> None:
        super().__init__()
        self.spec, self.label = spec, "loop"
        copies = spec.steps if spec.parameters == "per_step" else 1
        self.bodies = nn.ModuleList([spec.body.build(dim) for _ in range(copies)])
        routed = [row for row in spec.rows() if row is not None]
        # a pass that takes every token has no row among the router's weights
        self.rows = [None if row is None else routed.index(row) for row in spec.rows()]
        self.router = spec.router.build(dim, routed) if spec.router and routed else None
        self.encoding = (
            spec.encoding.build(dim, spec.steps, spec.residual.further_phi)
            if spec.encoding
            else Encoding()
        )
        self.inject = nn.Linear(2 * dim, dim, bias=False) if spec.injection == "linear" else None
        self.dial()

    def reset(self, rng: torch.Generator, depth: int) -> None:
        if self.inject is not None:  # starts as no injection at all
            nn.init.eye_(self.inject.weight)

    def dial(
        self, capacity: Sequence[float] | float | None = None, steps: int | None = None
    ) -> None:
        """Other capacities for the routed passes, another number of passes; None: as trained.

        Passes beyond the trained ones use what the last of those learned. Raises DialError.
        """
        self.passes = plan(self.spec, self.rows, self.label, capacity, steps)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        start_BTD, chosen = x_BTD, None
        first = {} if self.spec.kv == "shared" else ctx.first
        for one in self.passes:
            reads = one.step > 0 if self.spec.kv == "shared" else ctx.reads_first
            now = replace(
                ctx, first=first, reads_first=reads, order_BT=None, path=(*ctx.path, one.step)
            )
            if one.routed is None:
                x_BTD = self._full(x_BTD, start_BTD, one, now)
            elif one.routed.capacity == 0:
                x_BTD = self.spec.residual.rest(x_BTD, self._scale(one))
            else:
                chosen = self._choose(x_BTD, one.routed, now, chosen)
                x_BTD = self._routed(x_BTD, start_BTD, one, now, chosen)
        return x_BTD

    def _full(self, x_BTD: Tensor, start_BTD: Tensor, one: Pass, ctx: Context) -> Tensor:
        y_BTD = self._body(x_BTD, start_BTD, one, ctx)
        if one.step == 0:
            return self.encoding.after(y_BTD, 0)
        ctx.count_step(x_BTD)
        return self.spec.residual.join(x_BTD, y_BTD, None, self._scale(one))

    def _routed(
        self, x_BTD: Tensor, start_BTD: Tensor, one: Pass, ctx: Context, chosen: Choice
    ) -> Tensor:
        scale, index_BK = self._scale(one), chosen.index_BK
        rest_BTD = self.spec.residual.rest(x_BTD, scale)
        if index_BK.size(1) == 0:  # while decoding, often nobody is selected
            return rest_BTD
        inner = ctx.at(index_BK, chosen.stream)
        x_BKD = take(x_BTD, index_BK)
        inner.count_step(x_BKD)
        start_BKD = take(start_BTD, index_BK) if self.spec.injection else x_BKD
        y_BKD = self._body(x_BKD, start_BKD, one, inner)

        new_BKD = self.spec.residual.join(x_BKD, y_BKD, chosen.gate_BK, scale)
        if chosen.keep_BK is not None:
            rest_BKD = take(rest_BTD, index_BK)
            new_BKD = torch.where(chosen.keep_BK.unsqueeze(-1), new_BKD, rest_BKD)
        return put(rest_BTD, index_BK, new_BKD)

    def _body(self, x: Tensor, start: Tensor, one: Pass, ctx: Context) -> Tensor:
        if one.step > 0 and self.spec.injection == "add":
            x = x + start
        elif one.step > 0 and self.inject is not None:
            x = self.inject(torch.cat((x, start), -1))
        body = self.bodies[one.like if len(self.bodies) > 1 else 0]
        return body(self.encoding.before(x, one.like), ctx)

    def _choose(self, x_BTD: Tensor, at: Step, ctx: Context, before: Choice | None) -> Choice:
        assert self.router is not None
        assert self.spec.router is not None
        active_BT = before.mask(x_BTD.size(1)) if self.spec.router.nested and before else None
        chosen = self.router(x_BTD, at, ctx, active_BT)
        ctx.trace.shares[at.name] = chosen.stream.tokens(chosen.index_BK) / ctx.stream.tokens(x_BTD)
        return chosen

    def _scale(self, one: Pass) -> Callable[[Tensor], Tensor]:
        return lambda y: self.encoding.after(y, one.like)


def take(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens by index, [B, K, D]; index_select over flattened rows is the fastest gather."""
    B, T, D = x_BTD.shape
    return x_BTD.reshape(B * T, D).index_select(0, _flat(index_BK, T)).view(B, -1, D)


def put(x_BTD: Tensor, index_BK: Tensor, new_BKD: Tensor) -> Tensor:
    """A copy of ``x_BTD`` with the indexed tokens replaced; indices are distinct."""
    B, T, D = x_BTD.shape
    flat = x_BTD.reshape(B * T, D).index_copy(0, _flat(index_BK, T), new_BKD.reshape(-1, D))
    return flat.view(B, T, D)


def _flat(index_BK: Tensor, T: int) -> Tensor:
    rows_B1 = torch.arange(len(index_BK), device=index_BK.device).unsqueeze(1)
    return (index_BK + rows_B1 * T).flatten()
