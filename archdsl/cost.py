"""What a model costs, in closed form: parameters, FLOPs and cache, node by node.

Conventions. A multiply-add is two FLOPs; only matrix products count (norms, activations, softmax,
gathers and the embedding lookup do not), attention scores count as the full square of queries and
keys, as kernels and FlopCounterMode have it. A backward pass costs two forward passes. Shared
weights count once as parameters and every time they are used as FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from archdsl import verbs

if TYPE_CHECKING:
    from archdsl.spec import BlockSpec, ModelSpec

Routing = Literal["none", "expected", "all"]
NO_PARTS: Mapping[str, Cost] = MappingProxyType({})


class Runs(NamedTuple):
    """How often a block is run in one sequence, and on how many tokens each time.

    ``lengths``: tokens of each run. ``made``: of the runs that make keys and values; others read
    those of a first pass. ``pairs``: of a query and a key that it may be multiplied by, all told.
    """

    routing: Routing
    lengths: Sequence[int]
    made: Sequence[int]
    pairs: int


class Cost(NamedTuple):
    """Costs of one sequence through one node and everything below it."""

    params: int = 0
    matrices: int = 0  # of the parameters, those in matrices
    flops: int = 0
    kv: int = 0  # numbers kept in a cache after the sequence
    layers: int = 0  # attention layers met in one full pass
    passes: int = 0  # tokens through attention layers, all steps counted
    queries: int = 0  # their width in all attention layers of one full pass
    parts: Mapping[str, Cost] = NO_PARTS


class Bill:
    """What blocks that share their runs have, each of them adding its own; the bill multiplies.

    ``runs``: of one sequence, a set of them for each routing that is asked for.

    A block adds to ``vectors`` parameters that are multiplied or added element by element, to
    ``matrices`` and ``projections`` those that all tokens are multiplied by, these only where keys
    and values are made, to ``tables`` those that are looked up; to ``queries`` the width of all its
    heads and to ``layers`` one if it attends; to ``kv`` numbers that it keeps in a cache.
    """

    __slots__ = (
        *("dim", "runs", "copies", "weights", "detailed", "name", "below"),
        *("vectors", "matrices", "projections", "tables", "queries", "layers", "kv"),
    )

    def __init__(
        self,
        dim: int,
        runs: Sequence[Runs],
        detailed: bool = False,
        name: str = "",
        copies: int = 1,
        weights: int = 1,
    ) -> None:
        self.dim, self.runs, self.detailed, self.name = dim, runs, detailed, name
        self.copies, self.weights = copies, weights
        self.below: list[Bill] = []
        self.vectors = self.matrices = self.projections = self.tables = 0
        self.queries = self.layers = self.kv = 0

    def part(self, name: str) -> Bill:
        """Where a part adds what it has: here, unless a table by node is wanted."""
        return self._under(name, self.runs, 1, 1) if self.detailed else self

    def copied(self, name: str, n: int) -> Bill:
        """For a part that there are ``n`` of, each with weights of its own."""
        return self._under(name, self.runs, n, n) if n > 1 else self.part(name)

    def run(self, name: str, runs: Sequence[Runs], weights: int = 1) -> Bill:
        """For a part that is run otherwise, on so many sets of weights in turn."""
        return self._under(name, runs, 1, weights)

    def _under(self, name: str, runs: Sequence[Runs], copies: int, weights: int) -> Bill:
        copies, weights = self.copies * copies, self.weights * weights
        bill = Bill(self.dim, runs, self.detailed, name, copies, weights)
        self.below.append(bill)
        return bill

    def kept(self, window: int | None = None) -> int:
        """Tokens whose keys and values are kept, of each run the last ``window``."""
        made = self.runs[0].made
        return sum(made) if window is None else sum([min(tokens, window) for tokens in made])

    def flops(self, routing: int = 0) -> int:
        """In one sequence, by the routing that was asked for in this place."""
        runs = self.runs[routing]
        multiplied = sum(runs.lengths) * self.matrices
        if self.queries:  # of every pair a query by a key, a weight by a value
            multiplied += sum(runs.made) * self.projections + 2 * runs.pairs * self.queries
        return 2 * self.copies * multiplied + sum([bill.flops(routing) for bill in self.below])

    def total(self) -> Cost:
        """Of the first routing that was asked for."""
        parts = [bill.total() for bill in self.below]
        matrices = self.matrices + self.projections + self.tables
        params, copies = matrices + self.vectors, self.copies
        passes = self.layers * sum(self.runs[0].lengths)
        return Cost(
            self.weights * params + sum([part.params for part in parts]),
            self.weights * matrices + sum([part.matrices for part in parts]),
            self.flops(),
            copies * self.kv + sum([part.kv for part in parts]),
            copies * self.layers + sum([part.layers for part in parts]),
            copies * passes + sum([part.passes for part in parts]),
            copies * self.queries + sum([part.queries for part in parts]),
            {bill.name: part for bill, part in zip(self.below, parts, strict=True)}
            if self.detailed
            else NO_PARTS,
        )


def runs_of(tokens: int, *routings: Routing) -> tuple[Runs, ...]:
    """One sequence, in which all tokens attend to each other."""
    lengths = (tokens,)
    return tuple([Runs(routing, lengths, lengths, tokens * tokens) for routing in routings])


def block_cost(block: BlockSpec, dim: int, tokens: int) -> Cost:
    """One block of a model of width ``dim``, on one sequence."""
    bill = Bill(dim, runs_of(tokens, "expected"))
    block.cost(bill)
    return bill.total()


def sequence_cost(
    spec: ModelSpec,
    *,
    tokens: int | None = None,
    routing: Routing = "expected",
    detailed: bool = False,
) -> Cost:
    """The whole model on one sequence of ``tokens`` (default: the context)."""
    return _bill(spec, runs_of(tokens or spec.context, routing), detailed).total()


def _bill(spec: ModelSpec, runs: Sequence[Runs], detailed: bool = False) -> Bill:
    D, V = spec.dim, spec.vocab_size
    bill = Bill(D, runs, detailed)
    bill.part("embedding").tables += V * D
    for i, block in enumerate(spec.blocks):
        block.cost(bill.part(f"blocks.{i}"))
    bill.part("norm").vectors += D * (2 if spec.norm == "layer" else 1)
    head = bill.part("head")
    head.matrices += V * D
    if spec.tie_embeddings:
        head.tables -= V * D  # is the embedding's, and counted there
    return bill


class Receipt(NamedTuple):
    """What a spec costs; FLOPs are forward unless they say otherwise.

    ``lightest``/``expected``/``heaviest`` are FLOPs per token, averaged over the context, of a
    token that no router selects, at the routers' capacities, and that every router selects.
    """

    params: int
    matrices: int
    non_embedding: int
    context: int
    lightest: float
    expected: float
    heaviest: float
    flops_per_context: int
    train_flops_per_token: float
    kv_bytes_per_token: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


KV_BYTES = 2  # bfloat16, what caches are kept in
TRAIN_BYTES = 4  # float32 weights, gradients and two AdamW moments


def cost(spec: ModelSpec) -> Receipt:
    """The closed-form receipt of a spec.

    >>> import archdsl
    >>> receipt = archdsl.cost(archdsl.load("transformer"))
    >>> f"{receipt.matrices / 1e6:.1f}M"
    '162.0M'
    """
    T = spec.context
    bill = _bill(spec, runs_of(T, "expected", "none", "all"))
    expected, lightest, heaviest = bill.total(), bill.flops(1), bill.flops(2)
    tables = spec.vocab_size * spec.dim * (1 if spec.tie_embeddings else 2)
    return Receipt(
        params=expected.params,
        matrices=expected.matrices,
        non_embedding=expected.params - tables,
        context=T,
        lightest=lightest / T,
        expected=expected.flops / T,
        heaviest=heaviest / T,
        flops_per_context=expected.flops,
        train_flops_per_token=3 * expected.flops / T,
        kv_bytes_per_token=KV_BYTES * expected.kv / T,
        weight_bytes=TRAIN_BYTES * expected.params,
        gradient_bytes=TRAIN_BYTES * expected.params,
        optimizer_bytes=2 * TRAIN_BYTES * expected.params,
    )


def paper_flops(spec: ModelSpec, tokens: int | None = None) -> float:
    """Forward FLOPs of one sequence as Chen et al. (2502.13842, Table 2) count them.

    ``2 N T + 4 T^2 d L`` with N all matrices, embedding included, rounded to the table's three
    digits, times the mean number of passes per layer: embedding and head are multiplied too,
    although they run once. 3.29, 4.42 and 4.70 only come out if the base is rounded first.
    """
    T = tokens or spec.context
    whole = sequence_cost(spec, tokens=T)
    tied = spec.vocab_size * spec.dim if spec.tie_embeddings else 0
    base = float(f"{2 * (whole.matrices + tied) * T + 4 * T**2 * whole.queries:.2e}")
    return base * (whole.passes / (whole.layers * T) if whole.layers else 1.0)


verbs.callable_by_name(__name__)
