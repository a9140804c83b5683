"""What one model costs, added up: every block adds what it has to a bill, which multiplies.

Conventions. A multiply-add is two FLOPs; only matrix products count (norms, activations, softmax,
gathers and the embedding lookup do not), attention scores count as the full square of queries and
keys, as kernels and FlopCounterMode have it. Shared weights count once as parameters and every time
they are used as FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

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
