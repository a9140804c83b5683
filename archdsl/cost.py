"""What a model costs, in closed form: parameters, FLOPs and cache, node by node.

Conventions. A multiply-add is two FLOPs; only matrix products count (norms, activations, softmax,
gathers and the embedding lookup do not), attention scores count as the full square of queries and
keys, as kernels and FlopCounterMode have it. A backward pass costs two forward passes. Shared
weights count once as parameters and every time they are used as FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from archdsl import verbs

if TYPE_CHECKING:
    from archdsl.spec import BlockSpec, ModelSpec

NO_PARTS: Mapping[str, Cost] = MappingProxyType({})


class Cost(NamedTuple):
    """Costs of one sequence through one node and everything below it.

    ``lightest``, ``heaviest``: FLOPs if routers select no token, and if they select every one.
    """

    params: int = 0
    matrices: int = 0  # of the parameters, those in matrices
    flops: int = 0
    lightest: int = 0
    heaviest: int = 0
    kv: int = 0  # numbers kept in a cache after the sequence
    layers: int = 0  # attention layers met in one full pass
    passes: int = 0  # tokens through attention layers, all steps counted
    queries: int = 0  # width of all heads of the attention layers met in one full pass
    parts: Mapping[str, Cost] = NO_PARTS


class Runs(NamedTuple):
    """How often a block is run in one sequence.

    ``lengths``: tokens of each run, at the routers' capacities; ``pairs`` of a query and a key, in
    all of them. ``fewest``, ``most``: runs if routers select no token, and if they select every
    one; each of these is on the whole sequence.
    """

    lengths: list[int]
    pairs: int
    fewest: int = 1
    most: int = 1


class Bill:
    """What blocks have that are run alike: each adds its own, ``total`` multiplies.

    ``tokens``: of the whole sequence. ``runs``: of each block. ``makers``: those that make keys and
    values, which further runs may read. ``copies``: so often the blocks are there, one after the
    other; ``weights``: so often their parameters are. ``below``: bills of parts that are run
    otherwise, and where a table by node is wanted (``detailed``), of every part.
    """

    vectors: int  # parameters that are multiplied or added element by element
    matrices: int  # parameters in matrices that all tokens of all runs are multiplied by
    projections: int  # the same where keys and values are made
    tables: int  # parameters in matrices that are looked up
    queries: int  # width of all heads
    layers: int  # that attend
    kv: int  # numbers kept in a cache

    def __init__(
        self,
        dim: int,
        tokens: int,
        detailed: bool,
        name: str,
        runs: Runs,
        makers: Runs,
        copies: int = 1,
        weights: int = 1,
    ) -> None:
        self.dim, self.tokens, self.detailed, self.name = dim, tokens, detailed, name
        self.runs, self.makers, self.copies, self.weights = runs, makers, copies, weights
        self.vectors = self.matrices = self.projections = self.tables = 0
        self.queries = self.layers = self.kv = 0
        self.below: list[Bill] = []

    def part(self, name: str) -> Bill:
        """Where a part adds what it has."""
        return self.run(name, self.runs, self.makers) if self.detailed else self

    def copied(self, name: str, n: int) -> Bill:
        """Where a part does that is there ``n`` times, each with weights of its own."""
        return self.part(name) if n == 1 else self.run(name, self.runs, self.makers, n, n)

    def run(self, name: str, runs: Runs, makers: Runs, copies: int = 1, weights: int = 1) -> Bill:
        """Where a part does that is run otherwise."""
        copies, weights = self.copies * copies, self.weights * weights
        bill = Bill(self.dim, self.tokens, self.detailed, name, runs, makers, copies, weights)
        self.below.append(bill)
        return bill

    def kept(self, window: int | None = None) -> int:
        """Tokens whose keys and values are kept, of each run the last ``window``."""
        made = self.makers.lengths
        return sum(made) if window is None else sum([min(tokens, window) for tokens in made])

    def total(self) -> Cost:
        """Of all that was added here and below."""
        params = matrices = flops = lightest = heaviest = kv = layers = passes = queries = 0
        bills, T = [self], self.tokens
        for bill in bills:
            bills += bill.below  # their turn comes, too
            lengths, pairs, fewest, most = bill.runs
            makers, copies, tokens = bill.makers, bill.copies, sum(lengths)
            numbers = bill.matrices + bill.projections + bill.tables
            params += bill.weights * (numbers + bill.vectors)
            matrices += bill.weights * numbers
            applied, made = copies * bill.matrices, copies * bill.projections
            attended = 2 * copies * bill.queries  # a query meets a key, its weight a value
            flops += applied * tokens + made * sum(makers.lengths) + attended * pairs
            applied += attended * T  # of runs on the whole sequence
            lightest += applied * fewest + made * makers.fewest
            heaviest += applied * most + made * makers.most
            kv += copies * bill.kv
            layers += copies * bill.layers
            passes += copies * bill.layers * tokens
            queries += copies * bill.queries
        flops, lightest, heaviest = 2 * flops, 2 * T * lightest, 2 * T * heaviest
        parts = {bill.name: bill.total() for bill in self.below} if self.detailed else NO_PARTS
        return Cost(params, matrices, flops, lightest, heaviest, kv, layers, passes, queries, parts)


def block_cost(block: BlockSpec, dim: int, tokens: int) -> Cost:
    """One block of a model of width ``dim``, on one sequence."""
    bill = _bill(dim, tokens)
    block.cost(bill)
    return bill.total()


def sequence_cost(spec: ModelSpec, *, tokens: int | None = None, detailed: bool = False) -> Cost:
    """The whole model on one sequence of ``tokens`` (default: the context)."""
    D, V = spec.dim, spec.vocab_size
    bill = _bill(D, tokens or spec.context, detailed)
    bill.part("embedding").tables += V * D
    for i, block in enumerate(spec.blocks):
        block.cost(bill.part(f"blocks.{i}"))
    bill.part("norm").vectors += D * (2 if spec.norm == "layer" else 1)
    head = bill.part("head")
    head.matrices += V * D
    if spec.tie_embeddings:
        head.tables -= V * D  # is the embedding's, and counted there
    return bill.total()


def _bill(dim: int, tokens: int, detailed: bool = False) -> Bill:
    """Of one sequence, all tokens of which attend to each other."""
    whole = Runs([tokens], tokens * tokens)
    return Bill(dim, tokens, detailed, "", whole, whole)


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
    whole, T = sequence_cost(spec), spec.context
    tables = spec.vocab_size * spec.dim * (1 if spec.tie_embeddings else 2)
    return Receipt(
        params=whole.params,
        matrices=whole.matrices,
        non_embedding=whole.params - tables,
        context=T,
        lightest=whole.lightest / T,
        expected=whole.flops / T,
        heaviest=whole.heaviest / T,
        flops_per_context=whole.flops,
        train_flops_per_token=3 * whole.flops / T,
        kv_bytes_per_token=KV_BYTES * whole.kv / T,
        weight_bytes=TRAIN_BYTES * whole.params,
        gradient_bytes=TRAIN_BYTES * whole.params,
        optimizer_bytes=2 * TRAIN_BYTES * whole.params,
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
