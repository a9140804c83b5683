"""Loop: a body that is applied several times, by default with the same weights.

Inner Thinking Transformer (Chen et al. 2502.13842), with R, f and phi as there:

    Y(0) = f(X) * phi(0)                            the first step takes all tokens
    Y(t) = join(Y(t-1), w(t) * f(Y(t-1)), phi(t))   further steps take those the router selects

Other values in the slots give other models: no router and `overwrite` is a plain loop; no full
step, one routed step and `delta` is Mixture-of-Depths (Raposo et al. 2404.02258); a nested router
over a stack is Mixture-of-Recursions (Bae et al. 2507.10524); an input injection is Huginn's
(Geiping et al. 2502.05171); `add` encodings make a Universal Transformer (Dehghani et al.
1807.03819).

Shapes: B batch, T tokens, K selected tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from pydantic import Field, SerializeAsAny, WithJsonSchema

from archdsl.blocks.exit import ExitSpec
from archdsl.blocks.lora import LoraSpec, ParametersType
from archdsl.blocks.norm import EPS, NormType, norm_footprint, norm_size
from archdsl.blocks.residual_thinking import DeltaSpec, OverwriteSpec, ResidualSpec, ThinkingSpec
from archdsl.blocks.router import RouterSpec, share_of
from archdsl.blocks.step_encoding import EncodingSpec
from archdsl.costs.activations import FLOAT, Footprint, Rows, in_a_row
from archdsl.costs.bill import Bill, Runs
from archdsl.lang.spec import AnyBlock, BlockSpec, ModelSpec, Number, Part, Path, slot, walk
from archdsl.lang.training import Looping

if TYPE_CHECKING:
    from archdsl.nn.block import Block


# In Huginn's code the state starts like an embedding, with a variance of 2 / (5 D) times D.
START_STD = 0.6325

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
    exit: Annotated[
        SerializeAsAny[ExitSpec] | None,
        slot("exit"),
        WithJsonSchema({"x-family": "exit"}),
    ] = Field(
        None,
        exclude_if=lambda one: one is None,  # the hash of specs without it stays
        description="when a token stops looping; default: it takes every pass",
    )
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
    kv: Literal["own", "shared", "last", "all"] = Field(
        "own",
        description="own: the tokens of a pass attend to each other; shared: to the keys and "
        "values of all tokens of the first pass, which costs no further projection; last: to "
        "those of all tokens, each from the latest pass so far that it took; all: to those of "
        "all tokens, from every pass so far that they took",
    )
    parameters: ParametersType = Field(
        "shared",
        description="per_step: each pass has weights of its own; lora: each pass adds a low-rank "
        "difference of its own to the matrices of a shared body",
    )
    injection: Literal["add", "linear", "diagonal"] | None = Field(
        None,
        description="feed the loop's input again to further passes: added, by a matrix that reads "
        "both, or by a matrix after a decay of each channel of the state",
    )
    start: Literal["embedding", "zeros", "noise"] = Field(
        "embedding",
        exclude_if=lambda start: start == "embedding",  # the hash of specs without it stays
        description="what the first pass reads: the loop's input; or zeros or noise, and then "
        "the injection gives it the input",
    )
    start_std: float = Field(
        START_STD,
        gt=0,
        le=100,
        exclude_if=lambda std: std == START_STD,
        description="the standard deviation of start: noise",
    )
    norm: NormType | None = Field(
        None,
        exclude_if=lambda norm: norm is None,  # the hash of specs without it stays
        description="a norm after each pass, the same one, of the tokens that took the pass",
    )
    norm_eps: float = Field(
        EPS,
        gt=0,
        lt=1,
        exclude_if=lambda eps: eps == EPS,
        description="added to the variance in that norm",
    )
    body: AnyBlock = Field(description="the block that each pass runs")

    @property
    def nodes(self) -> int:
        """The loop itself, and its body once for each pass."""
        return 1 + self.body.nodes * self.steps

    def unrolled(self) -> tuple[BlockSpec, ...]:
        """Itself; the blocks of its body where it is built as its body."""
        return self.body.unrolled() if self.is_body else (self,)

    @property
    def leaves(self) -> ExitSpec | None:
        """The exit, if there is a pass after which it decides."""
        return self.exit if self.steps > 1 else None

    @property
    def is_body(self) -> bool:
        """Whether it is one pass over every token, which is the body itself."""
        plain = not self.first_injects and self.norm is None
        return self.steps == 1 and not self.shares and plain

    @property
    def first_injects(self) -> bool:
        """Whether the first pass, too, has an injection. Zeros plus the input are the input."""
        plain = self.start == "zeros" and self.injection == "add"
        return self.start != "embedding" and not plain

    @property
    def built_in_place(self) -> str | None:
        """The body, where the loop is one pass over every token."""
        return "body" if self.is_body else None

    def looping(self, path: Path) -> Looping | None:
        """What a rule of training needs to know; None where it is its body."""
        if self.is_body:
            return None
        own = {
            "parameters": self.parameters != "shared",
            "router": bool(self.shares) and self.router is not None and self.router.learned,
            "encoding": self.encoding is not None,
            "kv": self.kv == "shared",  # the first pass alone makes keys and values
        }
        most = self.steps if self.parameters == "per_step" else None
        fields = tuple(field for field, has in own.items() if has)
        joins = self.kv == "all"
        every = "exit" if self.leaves is not None and self.leaves.learned else None
        expects = self.leaves is not None and self.leaves.expects
        injects, routed = self.injection is not None, self.router is not None and bool(self.shares)
        return Looping(path, self.steps, injects, fields, most, joins, every, expects, routed)

    def at_depth(self, steps: int) -> LoopSpec:
        """The loop with ``steps`` passes; those beyond its own are as the last one."""
        loop = self.with_each(lambda part: part.at_depth(steps))
        if self.is_body:
            return loop
        if isinstance(self.parameters, LoraSpec):
            used = _shortest(self.parameters.rank, self.steps)
            parameters = self.parameters.model_copy(update={"rank": used})
            loop = loop.model_copy(update={"parameters": parameters})
        if self.leaves is not None:
            remaining = _lengthened(self.leaves.remaining, steps - 1)
            leaves = self.leaves.model_copy(update={"remaining": remaining})
            return loop.model_copy(update={"steps": steps, "exit": leaves})
        if not self.shares:
            return loop.model_copy(update={"steps": steps, "router": None, "exit": None})
        assert self.router is not None
        capacity = _lengthened(self.router.capacity, steps - self.full_steps)
        router = self.router.model_copy(update={"capacity": capacity})
        return loop.model_copy(update={"steps": steps, "router": router})

    def with_passes(self, shares: Sequence[float]) -> LoopSpec:
        """The loop with one pass for each of ``shares``.

        The passes after the ``full_steps`` first ones select these shares of their tokens; a share
        of 1 means that the pass has no router, so that none has to be paid for.
        """
        further = tuple(shares[self.full_steps :]) or (1.0,)
        router = self.router and self.router.model_copy(update={"capacity": further})
        remaining = _shortest(further, len(further))
        leaves = self.leaves and self.leaves.model_copy(update={"remaining": remaining})
        return self.model_copy(update={"steps": len(shares), "router": router, "exit": leaves})

    def rows(self) -> list[int | None]:
        """For each pass the step of the router that selects its tokens; None: every token.

        With an exit, the number of the pass after the first: tokens may have stopped before it.
        """
        routed = [None if t < self.full_steps else t - self.full_steps for t in range(self.steps)]
        if self.leaves is not None:
            return routed if self.shares else [None] * self.steps
        if self.router is None:
            return [None] * self.steps
        shares = self.router.capacity
        return [None if r is None or shares[min(r, len(shares) - 1)] == 1 else r for r in routed]

    @property
    def shares(self) -> list[float]:
        """The share of tokens of each pass that a router selects tokens for, or an exit leaves."""
        router, leaves, further = self.router, self.leaves, self.steps - self.full_steps
        if (router is None and leaves is None) or further < 1:
            return []
        given = (leaves.remaining if leaves else router.capacity if router else ())[:further]
        shares = [*given, *given[-1:] * (further - len(given))]
        if leaves is not None:
            return shares if leaves.stops or set(shares) != {1} else []
        return [share for share in shares if share != 1] if 1 in shares else shares

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """Lists of values that are too short for the passes, and what exits and ``kv`` exclude."""
        if self.exit is not None:
            yield from self._exit_conflicts(self.exit)
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
        if self.kv != "own":
            yield from self._kv_conflicts()
        if self.start != "embedding":
            yield from self._start_conflicts()
        if isinstance(self.parameters, LoraSpec):
            yield from self._lora_conflicts(self.parameters)

    def _exit_conflicts(self, leaves: ExitSpec) -> Iterator[tuple[Path, str]]:
        further, given = self.steps - 1, len(leaves.remaining)
        if 1 < given < further:
            yield (
                ("exit", "remaining"),
                f"needs one value, or one for each of the {further} passes after the first; "
                f"got {given}",
            )
        if self.router is not None:
            yield (
                ("exit",),
                "decides which tokens take further passes, and so does the router: leave out one "
                "of exit and router",
            )
        if self.kv == "all":
            yield (
                ("exit",),
                "is not defined for kv: all, where a token attends to each pass of the others: "
                "kv: last",
            )
        if self.full_steps != 1:
            yield (
                ("full_steps",),
                f"must be 1 beside an exit, as a token may stop after any pass; got "
                f"{self.full_steps}",
            )
        if getattr(self.residual, "unselected", None) == "literal":
            yield (
                ("residual", "unselected"),
                "literal would change tokens that stopped at the exit: unselected: bypass",
            )

    def _lora_conflicts(self, lora: LoraSpec) -> Iterator[tuple[Path, str]]:
        if 1 < len(lora.rank) < self.steps:
            yield (
                ("parameters", "rank"),
                f"needs one value, or one for each of the {self.steps} passes; "
                f"got {len(lora.rank)}",
            )
        if self.kv == "shared":
            yield ("kv",), "shared leaves lora of keys and values unused: parameters: shared"
        for path, part in walk(self):
            if isinstance(part, BlockSpec) and not part.adaptable:
                kind = type(part).model_fields["kind"].default
                yield (
                    ("parameters",),
                    f"lora is not defined for {'.'.join(map(str, path))}, a {kind}: "
                    "parameters: shared",
                )

    def _start_conflicts(self) -> Iterator[tuple[Path, str]]:
        if self.injection is None:
            yield (
                ("start",),
                f"{self.start} needs an injection, or the loop would not read its input: set "
                "injection to add, linear or diagonal, or leave start out",
            )
        if self.rows()[0] is not None:
            yield (
                ("start",),
                f"{self.start} needs a first pass over all tokens, or the others would stay as "
                "they start: full_steps of at least 1",
            )

    def _kv_conflicts(self) -> Iterator[tuple[Path, str]]:
        if self.full_steps < 1:
            yield (
                ("kv",),
                f"{self.kv} needs a first pass over all tokens: full_steps of at least 1",
            )
        if self.kv == "shared" and self.parameters == "per_step":
            yield ("kv",), "shared leaves per_step keys and values unused: parameters: shared"
        if any(isinstance(part, LoopSpec) for _, part in walk(self.body)) or isinstance(
            self.body, LoopSpec
        ):
            yield ("kv",), f"{self.kv} is not defined for a loop inside the body: kv: own"

    def canonical(self, dim: int) -> BlockSpec:
        """Its body where it is one; else the loop without settings that have no effect."""
        loop = super().canonical(dim)
        assert isinstance(loop, LoopSpec)
        if loop.is_body:
            return loop.body
        further = loop.steps - loop.full_steps
        update: dict[str, object] = {"parameters": _without_zeros(loop.parameters, loop.steps)}
        if loop.leaves is not None:
            remaining = _shortest(loop.leaves.remaining, further)
            leaves = loop.leaves.model_copy(update={"remaining": remaining})
            update |= {"router": None, "exit": leaves}
        elif loop.router is None or not loop.shares:
            update |= {"router": None, "full_steps": 1}
            if isinstance(loop.residual, ThinkingSpec):
                update["residual"] = ThinkingSpec()
            if loop.kv == "last":  # every token took every pass
                update["kv"] = "own"
        else:
            update["router"] = loop.router.model_copy(
                update={
                    name: _shortest(getattr(loop.router, name), further)
                    for name in ("capacity", "alpha")
                }
            )
        if loop.encoding is None and isinstance(loop.residual, DeltaSpec) and not loop.is_gated:
            update["residual"] = OverwriteSpec()  # y and x + (y - x) are one
        return loop.model_copy(update=update | dict(loop._unused()))

    def _unused(self) -> Iterator[tuple[str, object]]:
        """The defaults of the fields that have no effect."""
        if self.start != "noise":
            yield "start_std", START_STD
        if not self.first_injects:
            yield "start", "embedding"
        if self.norm is None:
            yield "norm_eps", EPS
        if self.leaves is None:
            yield "exit", None

    @property
    def is_gated(self) -> bool:
        """Whether a pass multiplies its results by a weight of each token or by a constant."""
        if self.router is None or self.leaves is not None or not self.shares:
            return False
        return self.router.learned or set(self.router.alpha) != {1.0}

    def build(self, dim: int) -> Block:
        """The torch module for width ``dim``: a loop, or its body (see `built_in_place`)."""
        from archdsl.blocks.modules.loop import BodyLoop

        return self.body.build(dim) if self.is_body else BodyLoop(self, dim)

    def cost(self, bill: Bill) -> None:
        """The body for each pass, at the capacities; the router, the encoding and the injection."""
        steps, shares, router, encoding = self.steps, self.shares, self.router, self.encoding
        full = steps - len(shares)
        if self.is_body:
            self.body.cost(bill)
            return
        runs = self._passes(bill.runs, full, shares)
        makers = bill.runs if self.kv == "shared" else runs
        weights = steps if self.parameters == "per_step" else 1
        ranks = self._ranks(bill.runs)
        self.body.cost(bill.run("body", runs, makers, weights=weights, ranks=ranks))
        if router is not None and self.leaves is None and shares:
            # a step that the compute dial skips uses no router
            router.cost(bill.part("router"), len(shares) - shares.count(0))
        if encoding is not None:
            encoding.cost(bill.part("encoding"), steps)
        self.residual.cost(bill)
        if self.leaves is not None:
            # after each pass but the last
            decided = self._passes(bill.runs, full if shares else full - 1, shares[:-1])
            decided = decided if self.leaves.stops else Runs([], 0, 0, 0)
            self.leaves.cost(bill.run("exit", decided, decided))
        if self.injection in ("linear", "diagonal"):
            self._injection_cost(bill, full, shares)
        if self.norm is not None:
            bill.part("norm").vectors += norm_size(self.norm, bill.dim)

    def _injection_cost(self, bill: Bill, full: int, shares: list[float]) -> None:
        """Its matrix, for every pass that it is used in, and the vectors of a diagonal one."""
        if not self.first_injects:
            starts_full = self.rows()[0] is None
            full, shares = full - starts_full, shares[not starts_full :]
        runs = self._passes(bill.runs, full, shares)
        inject = bill.run("injection", runs, runs)
        if self.injection == "linear":
            inject.matrices += 2 * bill.dim * bill.dim
        else:
            inject.matrices += bill.dim * bill.dim
            inject.vectors += 2 * bill.dim

    def _ranks(self, whole: Runs) -> list[tuple[Runs, int]]:
        """The runs and the rank of each pass that adds low-rank differences."""
        shares = iter(self.shares)
        passes = [
            self._passes(whole, 1, []) if row is None else self._passes(whole, 0, [next(shares)])
            for row in self.rows()
        ]
        ranks = [self.rank(step) for step in range(self.steps)]
        return [(runs, rank) for runs, rank in zip(passes, ranks, strict=True) if rank]

    def rank(self, step: int) -> int:
        """The rank of the low-rank differences in pass ``step``; 0 without any."""
        return self.parameters.at(step) if isinstance(self.parameters, LoraSpec) else 0

    def _passes(self, whole: Runs, full: int, shares: list[float]) -> Runs:
        """The runs of the body: ``full`` on all tokens, and one on each of ``shares``."""
        lengths, pairs = whole.lengths * full, whole.pairs * full
        kept = whole.lengths * full
        for tokens in whole.lengths:
            for share in shares:
                if taken := share_of(share, tokens):
                    lengths.append(taken)
                    pairs += taken * (taken if self.kv == "own" else tokens)
                    kept.append(tokens if self.kv == "last" else taken)
        most = full + len(shares)
        runs = Runs(lengths, pairs, whole.fewest * full, whole.most * most, kept)
        if self.kv != "all":
            return runs
        among_all = [
            [tokens] * full + [share_of(s, tokens) for s in shares] for tokens in whole.lengths
        ]
        return runs._replace(
            pairs=sum(_with_all_before(taken) for taken in among_all),
            fewest_pairs=whole.fewest * _with_all_before([1] * full),
            most_pairs=whole.most * _with_all_before([1] * most),
        )

    def footprint(self, rows: Rows) -> Footprint:
        """Its passes one after the other."""
        if self.is_body:
            return self.body.footprint(rows)
        passes = [self._pass(rows, step, row) for step, row in enumerate(self.rows())]
        keeps_states = rows.keeps_states
        if self.leaves is not None:
            decisions = self.leaves.footprint(rows, self.steps)
            keeps_states |= decisions.reads
            passes[-1][-1] = passes[-1][-1].plus(decisions.kept)
        for one in passes[1:]:
            one[0] = one[0]._replace(reads=one[0].reads or keeps_states)
        learning = min(self.steps, rows.backprop_last or self.steps)
        parts = [part for one in passes[-learning:] for part in one]
        whole, cut = in_a_row(rows.stream, parts), learning < self.steps
        if cut:  # what the passes without a gradient return is kept, in place of the loop's input
            whole = whole._replace(kept=whole.kept + rows.stream * whole.reads, reads=False)
        if self.injection != "diagonal":
            return whole
        # the loop's input is saved for the matrix, and a state that it does not start with, too
        state = rows.stream * (self.first_injects and not cut)
        last = list(enumerate(self.rows()))[-learning:]
        injects = any(row is None and self._injects(step) for step, row in last)
        return whole.plus(state)._replace(reads=whole.reads or injects)

    def _pass(self, rows: Rows, step: int, row: int | None) -> list[Footprint]:
        """A pass and, where it takes every token, the norm after it."""
        stops = self.leaves is None or self.leaves.in_training
        if row is not None and stops:
            return [self._routed_pass(rows, step, row)]
        norm = [] if self.norm is None else [norm_footprint(self.norm, rows)]
        return [self._full_pass(rows, step), *norm]

    def _full_pass(self, rows: Rows, step: int) -> Footprint:
        """Saved besides the body: the result, where it is multiplied."""
        at = rows
        if step and self.kv == "shared":
            at = rows._replace(projects=False)
        if step and self.kv == "all":
            by_row = any(row is not None for row in self.rows()[:step])
            at = rows._replace(keys=self._keys(rows.tokens, step), kv="all", by_row=by_row)
        body, made = self._body_pass(at, step, taken=False)
        kept = body.kept + at.stream * self._scales
        kept += self.residual.footprint(at) if step else 0
        # the gradient of the stream that a pass is added to waits for that of the body
        waits = step > 0 and not isinstance(self.residual, OverwriteSpec)
        work = body.work + at.stream * waits
        saves_state = self.injection == "diagonal" and self._injects(step)
        return Footprint(kept, saves_state or (body.reads and not made), work, body.angles)

    def _routed_pass(self, rows: Rows, step: int, row: int) -> Footprint:
        """Saved besides the body: the places of the tokens, and what is multiplied."""
        router = self.router
        padded = router is None or router.fills or rows.padded
        taken = rows.tokens if router is None else self._taken(rows.tokens, row)
        kv = "own" if step == 0 else self.kv
        at = rows.routed(taken, taken if kv == "own" else self._keys(rows.tokens, step), kv, padded)
        choice = Footprint(reads=False)
        if router is not None:
            left_out = router.nested and any(r is not None for r in self.rows()[:step])
            choice = router.footprint(rows._replace(padded=rows.padded or left_out), at)
        body, _ = self._body_pass(at, step, taken=True)
        # the router's weights read the selected tokens, which others may have saved already
        saved = self._injects(step) and self.injection == "diagonal"
        saved = saved or (body.reads and not self._changes_input(step))
        kept = at.stream * (router is not None and router.learned and not saved)
        kept += body.kept + choice.kept + at.tables(body.angles) + self.residual.footprint(at)
        kept += at.stream * ((router is not None and router.learned) + self._scales)
        literal = getattr(self.residual, "unselected", None) == "literal"
        places = 1 + self._injects(step) + (1 + padded) * literal
        # padding has the weight 0, of which a router that does not learn keeps nothing
        weighed = router is not None and self.residual.adds and self.norm is None and not literal
        marked = padded and not (weighed and router is not None and not router.learned)
        # a router that fills up marks all tokens, of which those of the selected ones are a part
        marks = rows if router is not None and router.fills else at
        kept += at.indices * places + marks.batch * marks.tokens * marked
        if self.norm is not None:
            kept += at.stream + norm_footprint(self.norm, at).kept
        return Footprint(
            kept,
            choice.reads or (self._scales and literal),
            body.work + rows.stream + 2 * at.stream,
        )

    def _keys(self, tokens: int, step: int) -> int:
        """The number of keys that a pass attends to if not those of its own tokens alone."""
        if self.kv != "all":
            return tokens
        rows = self.rows()[: step + 1]
        return sum([tokens if r is None else self._taken(tokens, r) for r in rows])

    def _taken(self, tokens: int, row: int) -> int:
        assert self.router is not None
        return self.router.tokens(tokens, row)

    def _body_pass(self, at: Rows, step: int, taken: bool) -> tuple[Footprint, bool]:
        """The body on its input, and whether that input is a new tensor, which is saved then."""
        at = at._replace(rank=self.rank(step), keeps_states=False)
        body, injects = self.body.footprint(at), self._injects(step)
        made = taken or self._changes_input(step)
        kept = at.stream * (body.reads and made)
        if injects and self.injection == "linear":
            kept += 2 * at.stream  # both as one
        if injects and self.injection == "diagonal":
            # what is written, three vectors and, of selected tokens, the state and the input
            kept += (3 if taken else 1) * at.stream + 3 * FLOAT * at.dim
        return body.plus(kept), made

    def _changes_input(self, step: int) -> bool:
        """Whether the body of a pass reads another tensor than the state."""
        return self._injects(step) or (self.encoding is not None and not self._scales)

    def _injects(self, step: int) -> bool:
        """Whether a pass reads the loop's input besides the state."""
        return self.injection is not None and (step > 0 or self.first_injects)

    @property
    def _scales(self) -> bool:
        return self.encoding is not None and self.encoding.multiplies


def loops_in(spec: ModelSpec) -> list[LoopSpec]:
    """Every loop of a spec in its order, a loop before those inside it."""
    return [part for _, part in walk(spec) if isinstance(part, LoopSpec)]


def with_loops(spec: ModelSpec, change: Callable[[int, LoopSpec], Part]) -> ModelSpec:
    """A copy in which every loop is changed, inner loops first.

    ``change``: given the number of the loop in the order of `loops_in`, and the loop.
    """
    order = count()

    def each(part: Part) -> Part:
        number = next(order) if isinstance(part, LoopSpec) else None
        part = part.with_each(each)
        return part if number is None else change(number, cast(LoopSpec, part))

    blocks = tuple(cast(BlockSpec, each(block)) for block in spec.blocks)
    return spec.model_copy(update={"blocks": blocks})


def _with_all_before(taken: Sequence[int]) -> int:
    """The pairs of each token with those of its own pass and of each pass before.

    ``taken``: the number of tokens of each pass.
    """
    return (sum(taken) ** 2 + sum(n * n for n in taken)) // 2


def _lengthened(given: tuple[float, ...], further: int) -> tuple[float, ...]:
    """The values of ``further`` passes, of which those beyond the given ones are as the last."""
    further = max(1, further)
    return _shortest(tuple(given[min(i, len(given) - 1)] for i in range(further)), further)


def _shortest(values: tuple[Number, ...], used: int) -> tuple[Number, ...]:
    """The values that the passes use; one number if all are equal."""
    values = values[:used]
    return values[:1] if len(set(values)) == 1 else values


def _without_zeros(parameters: str | LoraSpec, steps: int) -> str | LoraSpec:
    """The ranks that the passes use; ``shared`` if all of them are 0."""
    if not isinstance(parameters, LoraSpec):
        return parameters
    rank = _shortest(parameters.rank, steps)
    return parameters.model_copy(update={"rank": rank}) if any(rank) else "shared"
