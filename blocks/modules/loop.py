"""The torch module of a loop, which runs its passes one after the other.

Shapes: B batch, T tokens, K selected tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, ClassVar, assert_never, cast

import torch
from torch import Tensor, nn

from archdsl.blocks.lora import LoraSpec
from archdsl.blocks.modules.dial import plan
from archdsl.blocks.modules.injection import DiagonalInjection, make_injection, reset_injection
from archdsl.blocks.modules.lora import Lora
from archdsl.blocks.modules.router import ScoreRouter
from archdsl.blocks.modules.step_encoding import Encoding
from archdsl.nn.block import Block, Context, KeysValues, Part
from archdsl.nn.gather import join, put, split, take
from archdsl.nn.loop import Loop, Pass, Selection, Step
from archdsl.nn.noise import normal
from archdsl.nn.norm import make_norm

if TYPE_CHECKING:
    from archdsl.blocks.loop import LoopSpec
    from archdsl.blocks.modules.exit import Going
    from archdsl.lang.spec import BlockSpec


Run = Callable[..., Tensor]


def without_gradient_unless_it_learns(run: Run) -> Run:
    """Runs a pass ``run(loop, x_BTD, start_BTD, one, ...)``; where it does not learn, no activation
    is saved, and no gradient goes through it."""

    @wraps(run)
    def as_told(
        loop: BodyLoop, x_BTD: Tensor, start_BTD: Tensor, one: Pass, *more: object
    ) -> Tensor:
        if one.learns:
            return run(loop, x_BTD, start_BTD, one, *more)
        with torch.no_grad():
            return run(loop, x_BTD, start_BTD, one, *more)

    return as_told


class BodyLoop(Loop):
    """Runs its body pass by pass, on all tokens or on those that its router selects."""

    writes_to_stream: ClassVar[bool] = False
    hosted: bool = True
    spec: LoopSpec

    def __init__(self, spec: LoopSpec, dim: int) -> None:
        super().__init__()
        self.spec, self.label, self.place = spec, "loop", "loop"
        self.steps, self.full_steps = spec.steps, spec.full_steps
        self.most_steps = spec.steps if spec.parameters == "per_step" else None
        copies = spec.steps if spec.parameters == "per_step" else 1
        self.bodies = nn.ModuleList([spec.body.build(dim) for _ in range(copies)])
        routed = [row for row in spec.rows() if row is not None]
        self.exit = spec.leaves.build(dim) if spec.leaves else None
        self.thresholds = spec.leaves.thresholds if spec.leaves else ()
        self.needs_readout = spec.leaves is not None and spec.leaves.needs_readout
        # the router has no weights for a pass that takes every token
        self.rows = [None if row is None else routed.index(row) for row in spec.rows()]
        self.router = spec.router.build(dim, routed) if spec.router and routed else None
        self.encoding = (
            spec.encoding.build(dim, spec.steps, spec.residual.further_phi)
            if spec.encoding
            else Encoding()
        )
        self.inject = make_injection(spec.injection, dim)
        low_rank = spec.parameters if isinstance(spec.parameters, LoraSpec) else None
        self.lora = Lora(low_rank, spec.steps, self.bodies[0]) if low_rank else None
        self.norm = make_norm(spec.norm, dim, spec.norm_eps) if spec.norm else None
        self.residual = spec.residual.build(dim)
        # no framework leaves out tokens
        self.hosted = spec.leaves is None or not spec.leaves.stops
        self.dial()

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Sets the norm to 1 and the injection as `reset_injection` says."""
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.inject is not None:
            reset_injection(self.inject, state_only=not self.spec.first_injects)

    def dial(
        self, capacity: Sequence[float] | float | None = None, steps: int | None = None
    ) -> None:
        """Other capacities for the routed passes, another number of passes; None: as trained.

        Passes beyond the trained ones use what the last of those learned. Raises DialError.
        """
        self.passes = plan(self.spec, self.rows, self.label, capacity, steps, place=self.place)

    def dial_exit(self, threshold: float | None = None) -> None:
        """Another threshold of the exit; None: as trained. Raises DialError."""
        if self.exit is None:
            super().dial_exit(threshold)
        count = len(self.passes)
        self.passes = plan(self.spec, self.rows, self.label, None, count, threshold, self.place)

    def built_as(self, field: str) -> list[nn.Module]:
        """The bodies for ``body``; else as `Primitive.built_as`."""
        return list(self.bodies) if field == "body" else super().built_as(field)

    def as_run(self, spec: BlockSpec, shares: Sequence[float]) -> BlockSpec:
        """See `LoopSpec.with_passes`; an exit has the threshold that it is dialled to."""
        made = cast("LoopSpec", spec).with_passes(shares)
        if made.exit is None:
            return made
        dialled = made.exit.model_copy(update={"threshold": self.passes[-1].exit})
        return made.model_copy(update={"exit": dialled})

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The stream after all passes, [B, T, D]."""
        if ctx.part is not None:
            return self._part(x_BTD, replace(ctx, part=None), ctx.part)
        start_BTD, chosen = x_BTD, None
        x_BTD = self._first_state(x_BTD, ctx)
        known = None if self.exit is None else self.exit.begin(x_BTD, ctx)
        after_passes = ctx.passes
        ctx = self._inner(ctx)
        skipped = 0  # no token takes the routed passes before this one
        around = zip((None, *self.passes), self.passes, (*self.passes[1:], None), strict=False)
        for before, one, following in around:
            ctx = self._following(ctx, before, one)
            if one.routed is not None and one.routed.capacity == 0 and known is None:
                x_BTD = self.spec.residual.rest(x_BTD, self._scale(one))
                continue
            if one.routed is not None and one.step >= skipped:
                skipped = one.step + self._skips(x_BTD, one, ctx)
            if one.routed is not None and one.step < skipped:
                ctx.trace.count(one.routed.key, 0, ctx.stream.tokens(x_BTD))
                continue
            now = replace(ctx, path=(*ctx.path, one.step))
            chosen = self._choose(x_BTD, one, now, chosen, known)
            if chosen is None:
                x_BTD = self._full(x_BTD, start_BTD, one, now)
            else:
                x_BTD = self._routed(x_BTD, start_BTD, one, now, chosen)
                chosen.stream.advance()
            if after_passes is not None and one.learns:
                after_passes.append(x_BTD)
            nobody = chosen is not None and chosen.index_BK.size(1) == 0
            if self.exit is not None and known is not None and following and not nobody:
                known = self.exit.after(x_BTD, known, chosen, following, now)
        if self.exit is None or known is None:
            return x_BTD
        return self.exit.end(x_BTD, known, self.place, ctx)

    def _inner(self, ctx: Context) -> Context:
        """The context of the passes."""
        handed: dict[Block, KeysValues] | None = None if self.spec.kv == "own" else {}
        return replace(ctx, kv=self.spec.kv, handed=handed, order_BT=None, whole=None, passes=None)

    def _following(self, ctx: Context, before: Pass | None, one: Pass) -> Context:
        """The context of ``one``; what the pass before it handed on is known by its own blocks."""
        if not ctx.handed or before is None or self.body(before) is self.body(one):
            return ctx
        return replace(ctx, handed=_moved(ctx.handed, self.body(before), self.body(one)))

    @property
    def skippable(self) -> list[Step]:
        """See `Loop`: all routed passes; none where a pass that is left out changes something, or
        where passes after it have more to know."""
        full, routed = self._full_and_routed()
        steps = [one.routed for one in routed if one.routed is not None]
        x = torch.zeros(1)
        kept = self.exit is None and self.spec.residual.rest(x, lambda y: y) is x
        known = isinstance(self.router, ScoreRouter) and self.spec.kv in ("own", "shared")
        nested = any(isinstance(one, Loop) for one in self.bodies.modules())
        simple = kept and known and not nested and len(steps) == len(routed)
        return steps if simple and (full or self.spec.kv == "own") else []

    def _full_and_routed(self) -> tuple[list[Pass], list[Pass]]:
        """The first passes, which take every token, and those of the others that any may take."""
        # not itertools.takewhile, which the compiler of torch 2.11 cannot read
        routed = [place for place, one in enumerate(self.passes) if one.routed is not None]
        first = routed[0] if routed else len(self.passes)
        full, others = self.passes[:first], self.passes[first:]
        return full, [one for one in others if one.routed is None or one.routed.capacity > 0]

    def _part(self, x_BTD: Tensor, ctx: Context, part: Part) -> Tensor:
        """The stream after a part, [B, 1, D]; see `Part`."""
        full, routed = self._full_and_routed()
        chosen, later = None, 0
        if part.at is None:
            x_BTD = self._full_part(x_BTD, ctx, part, full)
        ctx = replace(self._inner(ctx), handed=part.handed)
        if part.at is not None:
            one, later = routed[part.at], part.at + 1
            last = full[-1] if full else None
            now = replace(self._following(ctx, last, one), path=(*ctx.path, one.step))
            chosen = self._chosen_before(one, now, part)
            assert part.start_BTD is not None
            x_BTD = self._routed(x_BTD, part.start_BTD, one, now, chosen)
            chosen.stream.advance()
        selected, scores = [], []
        for one in routed[later:]:
            now = replace(ctx, path=(*ctx.path, one.step))
            chosen = self._ask(x_BTD, one, now, chosen)
            selected.append(cast(Tensor, chosen.keep_BK)[:, 0])
            scores.append(cast(Tensor, chosen.score_BK)[:, 0])
        if selected:
            part.selected_PB[later:] = torch.stack(selected)
            part.score_PB[later:] = torch.stack(scores)
        return x_BTD

    def _chosen_before(self, one: Pass, ctx: Context, part: Part) -> Selection:
        """What the router selected for a pass when it was asked last."""
        assert isinstance(self.router, ScoreRouter)
        assert one.routed is not None
        selected_BT = part.selected_PB[part.at].unsqueeze(1)
        score_BT = part.score_PB[part.at].unsqueeze(1)
        return self.router.again(selected_BT, score_BT, one.routed, ctx)

    def _full_part(self, x_BTD: Tensor, ctx: Context, part: Part, full: list[Pass]) -> Tensor:
        part.start_BTD = start_BTD = x_BTD.clone() if self.spec.injection else x_BTD
        x_BTD, inner = self._first_state(x_BTD, ctx), self._inner(ctx)
        for before, one in zip((None, *full), full, strict=False):
            inner = self._following(inner, before, one)
            now = replace(inner, path=(*inner.path, one.step))
            x_BTD = self._full(x_BTD, start_BTD, one, now)
        part.handed = inner.handed
        return x_BTD

    def _first_state(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The state that the first pass reads, [B, T, D].

        Noise is drawn anew in each training pass, for each row by its `Context.noise_B`. Otherwise
        it depends on the position alone, so that no other token, chunk or pass changes it.
        """
        match self.spec.start if self.spec.first_injects else "embedding":
            case "embedding":
                return x_BTD
            case "zeros":
                return torch.zeros_like(x_BTD)
            case "noise" if self.training and ctx.noise_B is None:
                return torch.randn_like(x_BTD) * self.spec.start_std
            case "noise":
                pos_BT = ctx.stream.order(x_BTD) if ctx.pos_BT is None else ctx.pos_BT
                if self.training and ctx.noise_B is not None:
                    pos_BT = pos_BT + _at(ctx.path, ctx.noise_B).unsqueeze(1)
                noise_BTD = normal(pos_BT, x_BTD.size(-1), x_BTD.dtype)
                return (noise_BTD * self.spec.start_std).expand_as(x_BTD)
            case start:
                assert_never(start)

    @without_gradient_unless_it_learns
    def _full(self, x_BTD: Tensor, start_BTD: Tensor, one: Pass, ctx: Context) -> Tensor:
        y_BTD = self._body(x_BTD, start_BTD, one, ctx)
        if one.step == 0:
            return self._normed(cast(Tensor, self.encoding(y_BTD, 0, after=True)))
        ctx.count_step(x_BTD)
        return self._normed(self._join(x_BTD, y_BTD, None, one))

    @without_gradient_unless_it_learns
    def _routed(
        self, x_BTD: Tensor, start_BTD: Tensor, one: Pass, ctx: Context, chosen: Selection
    ) -> Tensor:
        index_BK = chosen.index_BK
        rest_BTD = self.spec.residual.rest(x_BTD, self._scale(one))
        if index_BK.size(1) == 0 and not ctx.handed:  # while decoding, often nobody is selected
            return rest_BTD
        inner = ctx.at(index_BK, chosen.stream, chosen.keep_BK)
        if index_BK.size(1) == 0:
            for block in ctx.handed or ():
                block.pass_over(inner)
            return rest_BTD
        left = None
        if rest_BTD is x_BTD:
            x_BKD, left = split(x_BTD, index_BK)
        else:
            x_BKD = take(x_BTD, index_BK)
        inner.count_step(x_BKD)
        start_BKD = take(start_BTD, index_BK) if self.spec.injection else x_BKD
        y_BKD = self._body(x_BKD, start_BKD, one, inner)

        keep_BK, weight_BK = chosen.keep_BK, self._weights(x_BKD, one, chosen)
        if keep_BK is not None and left and weight_BK is not None and self._adds:
            weight_BK, keep_BK = weight_BK * keep_BK, None
        new_BKD = self._normed(self._join(x_BKD, y_BKD, weight_BK, one))
        if keep_BK is not None:
            rest_BKD = x_BKD if left else take(rest_BTD, index_BK)
            new_BKD = torch.where(keep_BK.unsqueeze(-1), new_BKD, rest_BKD)
        return join(left, new_BKD) if left else put(rest_BTD, index_BK, new_BKD)

    @property
    def _adds(self) -> bool:
        """Whether a token with the weight 0 stays what it was."""
        return self.spec.residual.adds and self.norm is None

    def _weights(self, x_BKD: Tensor, one: Pass, chosen: Selection) -> Tensor | None:
        if self.router is None or one.routed is None:
            return None
        return self.router.weights(x_BKD, one.routed, chosen)

    def _join(self, x: Tensor, y: Tensor, gate: Tensor | None, one: Pass) -> Tensor:
        scale = self._scale(one)
        if self.residual is None:
            return self.spec.residual.join(x, y, gate, scale)
        return self.residual(x, y, gate, scale)

    def _body(self, x: Tensor, start: Tensor, one: Pass, ctx: Context) -> Tensor:
        if one.step > 0 or self.spec.first_injects:
            x = self._injected(x, start)
        if self.lora is not None:
            ctx = replace(ctx, added=self.lora.added(one.like))
        return self.body(one)(self.encoding(x, one.like), ctx)

    def _injected(self, x: Tensor, start: Tensor) -> Tensor:
        if self.spec.injection == "add":
            return x + start
        if isinstance(self.inject, DiagonalInjection):
            return cast(Tensor, self.inject(x, start))
        return x if self.inject is None else self.inject(torch.cat((x, start), -1))

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def body(self, one: Pass) -> Block:
        """The block that a pass runs."""
        return cast(Block, self.bodies[one.like if len(self.bodies) > 1 else 0])

    def _choose(
        self, x_BTD: Tensor, one: Pass, ctx: Context, before: Selection | None, known: Going | None
    ) -> Selection | None:
        """The tokens that take a pass; None: every token."""
        at = one.routed
        if at is None:
            return None
        if self.exit is not None and known is not None:
            if self.training and not self.exit.in_training:
                return None
            chosen = self.exit.choose(x_BTD, known, ctx)
        else:
            chosen = self._ask(x_BTD, one, ctx, before)
        selected = chosen.stream.tokens(chosen.index_BK)
        ctx.trace.count(at.key, selected, ctx.stream.tokens(x_BTD))
        return chosen

    def _skips(self, x_BTD: Tensor, one: Pass, ctx: Context) -> int:
        """How many passes from ``one`` on no token takes, if they then change nothing at all."""
        router, spec = self.router, self.spec
        if router is None or self.exit is not None or spec.kv != "own":
            return 0
        if self.training or ctx.cache is None or ctx.stream.static:
            return 0
        assert spec.router is not None
        if spec.router.nested or spec.residual.rest(x_BTD, self._scale(one)) is not x_BTD:
            return 0
        return router.skips(x_BTD, self.passes[one.step :], ctx)

    def _ask(self, x_BTD: Tensor, one: Pass, ctx: Context, before: Selection | None) -> Selection:
        """The tokens that the router selects for a pass; ``before``: those of the pass before."""
        assert self.router is not None
        assert self.spec.router is not None
        assert one.routed is not None
        nested = self.spec.router.nested
        active_BT = before.mask(x_BTD.size(1)) if nested and before else None
        chosen: Selection = self.router(x_BTD, one.routed, ctx, active_BT)
        return chosen

    def _scale(self, one: Pass) -> Callable[[Tensor], Tensor]:
        like = one.like  # alone, because the name of a pass differs between equal loops
        return lambda y: cast(Tensor, self.encoding(y, like, after=True))


def _moved(handed: dict[Block, KeysValues], before: Block, body: Block) -> dict[Block, KeysValues]:
    """What blocks of the body ``before`` handed on, by the blocks at their places in ``body``."""
    pairs = zip(before.modules(), body.modules(), strict=True)
    return {cast(Block, now): handed[old] for old, now in pairs if old in handed}


def _at(path: tuple[int, ...], noise_B: Tensor) -> Tensor:
    """Other numbers for each pass of the loops around, whose steps are ``path``."""
    for step in path:
        noise_B = noise_B * 0x9E3779B1 + step + 1
    return noise_B
