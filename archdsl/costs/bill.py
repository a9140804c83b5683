"""A bill adds up the costs of a model: each block adds its sizes, and the bill multiplies them.

Conventions: A multiply-add is two FLOPs. Only matrix products count; norms, activations, softmax,
gathers and the embedding lookup do not. Attention counts all pairs of queries and keys, also masked
ones, as kernels and torch's FlopCounterMode do. Shared weights count once as parameters, and as
FLOPs every time that they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

NO_PARTS: Mapping[str, Cost] = MappingProxyType({})


class Cost(NamedTuple):
    """The costs of one sequence through one node and everything below it.

    ``flops``: at the capacities of the routers. ``lightest`` and ``heaviest``: FLOPs if the routers
    select no token, and if they select every token.
    """

    params: int = 0
    matrices: int = 0  # of the parameters, those in matrices
    idle: int = 0  # of these, those that a token does not use, as those of other experts
    flops: int = 0
    lightest: int = 0
    heaviest: int = 0
    kv: int = 0  # numbers kept in a cache after the sequence, which grow with it
    state: int = 0  # numbers kept in a cache that do not depend on the length of the sequence
    layers: int = 0  # attention layers met in one full pass
    passes: int = 0  # tokens through attention layers, all steps counted
    queries: int = 0  # width of all heads of the attention layers met in one full pass
    parts: Mapping[str, Cost] = NO_PARTS


class Runs(NamedTuple):
    """How often a block runs on one sequence.

    ``lengths``: the number of tokens of each run at the capacities of the routers. ``pairs``: the
    number of pairs of a query and a key in all runs. ``fewest`` and ``most``: the number of runs
    if the routers select no token, and if they select every token; these are runs on the whole
    sequence. ``kept``: for each run, the number of tokens whose keys and values it keeps in a
    cache; None: those that it runs on. ``fewest_pairs`` and ``most_pairs``: the pairs of these
    runs, as a multiple of those of the whole sequence with itself; None: ``fewest`` and ``most``.
    """

    lengths: list[int]
    pairs: int
    fewest: int = 1
    most: int = 1
    kept: list[int] | None = None
    fewest_pairs: int | None = None
    most_pairs: int | None = None


class Bill:
    """The sizes of blocks that run equally often. Each block adds its sizes; `total` multiplies.

    ``tokens``: the length of the whole sequence. ``vocabulary``: the rows of the head, for blocks
    that use it. ``runs``: how often each block runs. ``makers``:
    the runs that compute keys and values, which other runs may use. ``copies``: how many times the
    blocks are repeated, one after the other. ``weights``: how many copies of their parameters
    exist. ``ranks``: for each pass of a loop around the blocks with low-rank differences, its runs
    and the rank. ``below``: the bills of parts that run more or less often and, if ``detailed``,
    of every part.
    """

    vectors: int  # parameters that are multiplied or added element by element
    matrices: int  # parameters in matrices that all tokens of all runs are multiplied by
    projections: int  # the same where keys and values are made
    ends: int  # the sum of inputs and outputs of matrices to which low-rank differences are added
    idle: int  # parameters in matrices of which each token uses others, as those of experts
    idle_ends: int  # the same sum for these
    tables: int  # parameters in matrices that are looked up
    queries: int  # width of all heads
    layers: int  # that attend
    kv: int  # numbers kept in a cache after the sequence
    state: (
        int  # numbers of fixed size that each run keeps in a cache, such as those of a recurrence
    )

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
        ranks: Sequence[tuple[Runs, int]] = (),
        vocabulary: int = 0,
    ) -> None:
        self.dim, self.tokens, self.detailed, self.name = dim, tokens, detailed, name
        self.runs, self.makers, self.copies, self.weights = runs, makers, copies, weights
        self.ranks, self.vocabulary = ranks, vocabulary
        self.vectors = self.matrices = self.projections = self.ends = self.tables = 0
        self.idle = self.idle_ends = self.queries = self.layers = self.kv = self.state = 0
        self.below: list[Bill] = []

    def linear(
        self, fan_in: int, fan_out: int, count: int = 1, *, keys: bool = False, idle: int = 0
    ) -> None:
        """Adds ``count`` matrices that blocks apply by `Context.linear`.

        ``keys``: whether they make keys or values, and so run only where these are made. ``idle``:
        how many more there are that a token does not use, as those of other experts.
        """
        self.idle += idle * fan_in * fan_out
        self.idle_ends += idle * (fan_in + fan_out)
        if keys:
            self.projections += count * fan_in * fan_out
        else:
            self.matrices += count * fan_in * fan_out
        self.ends += count * (fan_in + fan_out)

    def part(self, name: str) -> Bill:
        """Returns the bill to which the part ``name`` adds its sizes."""
        return self.run(name, self.runs, self.makers) if self.detailed else self

    def copied(self, name: str, n: int) -> Bill:
        """Returns the bill of a part that exists ``n`` times, each time with its own weights."""
        return self.part(name) if n == 1 else self.run(name, self.runs, self.makers, n, n)

    def run(
        self,
        name: str,
        runs: Runs,
        makers: Runs,
        copies: int = 1,
        weights: int = 1,
        ranks: Sequence[tuple[Runs, int]] | None = None,
    ) -> Bill:
        """Returns the bill of a part that runs ``runs`` times per sequence.

        ``ranks``: by default those of this bill.
        """
        copies, weights = self.copies * copies, self.weights * weights
        ranks = self.ranks if ranks is None else ranks
        bill = Bill(
            self.dim,
            self.tokens,
            self.detailed,
            name,
            runs,
            makers,
            copies,
            weights,
            ranks,
            self.vocabulary,
        )
        self.below.append(bill)
        return bill

    def kept(self, window: int | None = None) -> int:
        """Returns the number of tokens whose keys and values are in the cache after the sequence.

        With ``window``, only the last ``window`` tokens of each run are.
        """
        made = self.makers.lengths if self.makers.kept is None else self.makers.kept
        return sum(made) if window is None else sum([min(tokens, window) for tokens in made])

    def total(self) -> Cost:
        """Returns the costs of everything added to this bill and to the bills below it."""
        params = matrices = flops = lightest = heaviest = kv = state = layers = passes = queries = 0
        idle = 0
        bills, T = [self], self.tokens
        for bill in bills:
            bills += bill.below  # the loop reaches these bills later
            lengths, pairs, fewest, most, _, fewest_pairs, most_pairs = bill.runs
            makers, copies, tokens = bill.makers, bill.copies, sum(lengths)
            numbers = bill.matrices + bill.projections + bill.tables + bill.idle
            idle += bill.weights * bill.idle
            params += bill.weights * (numbers + bill.vectors)
            matrices += bill.weights * numbers
            applied, made = copies * bill.matrices, copies * bill.projections
            attended = 2 * copies * bill.queries  # queries with keys, and weights with values
            flops += applied * tokens + made * sum(makers.lengths) + attended * pairs
            attended *= T  # of runs on the whole sequence
            lightest += applied * fewest + made * makers.fewest
            lightest += attended * (fewest if fewest_pairs is None else fewest_pairs)
            heaviest += applied * most + made * makers.most
            heaviest += attended * (most if most_pairs is None else most_pairs)
            for passed, rank in bill.ranks:
                numbers = bill.weights * rank * (bill.ends + bill.idle_ends)
                params += numbers
                matrices += numbers
                idle += bill.weights * rank * bill.idle_ends
                added = copies * rank * bill.ends
                flops += added * sum(passed.lengths)
                lightest += added * passed.fewest
                heaviest += added * passed.most
            kv += copies * bill.kv
            state += copies * bill.state * len(lengths)
            layers += copies * bill.layers
            passes += copies * bill.layers * tokens
            queries += copies * bill.queries
        flops, lightest, heaviest = 2 * flops, 2 * T * lightest, 2 * T * heaviest
        parts = {bill.name: bill.total() for bill in self.below} if self.detailed else NO_PARTS
        return Cost(
            params=params,
            matrices=matrices,
            idle=idle,
            flops=flops,
            lightest=lightest,
            heaviest=heaviest,
            kv=kv,
            state=state,
            layers=layers,
            passes=passes,
            queries=queries,
            parts=parts,
        )
