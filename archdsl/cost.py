"""What a model costs, in closed form: parameters, FLOPs and cache, node by node.

Conventions. A multiply-add is two FLOPs; only matrix products count (norms, activations, softmax,
gathers and the embedding lookup do not), attention scores count as the full square of queries and
keys, as kernels and FlopCounterMode have it. A backward pass costs two forward passes. Shared
weights count once as parameters and every time they are used as FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from archdsl import verbs

if TYPE_CHECKING:
    from archdsl.spec import ModelSpec

Routing = Literal["none", "expected", "all"]
NO_PARTS: Mapping[str, Cost] = MappingProxyType({})


class Scope(NamedTuple):
    """What a block runs on: one sequence, or what a router selected of it.

    ``keys``: tokens that attention looks at; more than ``tokens`` where a routed step reads the
    first pass's keys and values, which then cost no projection (``projects`` is False).
    """

    dim: int
    tokens: int
    keys: int
    projects: bool = True
    routing: Routing = "expected"
    detailed: bool = False  # whether costs keep their parts, for a table by node

    def routed(self, tokens: int, shared: bool) -> Scope:
        """The same block on ``tokens`` of these tokens."""
        keys = self.keys if shared else tokens
        return Scope(self.dim, tokens, keys, not shared, self.routing, self.detailed)

    def together(self, parts: Mapping[str, Cost]) -> Cost:
        """Nodes run one after the other, each with its own weights."""
        params = matrices = flops = kv = layers = passes = scores = 0
        for part in parts.values():
            params += part.params
            matrices += part.matrices
            flops += part.flops
            kv += part.kv
            layers += part.layers
            passes += part.passes
            scores += part.scores
        kept = parts if self.detailed else NO_PARTS
        return Cost(params, matrices, flops, kv, layers, passes, scores, kept)


class Cost(NamedTuple):
    """Costs of one sequence through one node and everything below it."""

    params: int = 0
    matrices: int = 0  # of the parameters, those in matrices
    flops: int = 0
    kv: int = 0  # numbers kept in a cache after the sequence
    layers: int = 0  # attention layers met in one full pass
    passes: int = 0  # tokens through attention layers, all steps counted
    scores: int = 0  # FLOPs of attention scores of one full pass
    parts: Mapping[str, Cost] = NO_PARTS

    def plus(self, run: Cost) -> Cost:
        """This node and a further run with the same weights."""
        return Cost(
            self.params,
            self.matrices,
            self.flops + run.flops,
            self.kv + run.kv,
            self.layers,
            self.passes + run.passes,
            self.scores,
            self._each(lambda name, part: part.plus(run.parts[name])),
        )

    def weights(self, n: int) -> Cost:
        """The same runs, each of ``n`` with weights of its own."""
        parts = self._each(lambda _, part: part.weights(n))
        return self._replace(params=n * self.params, matrices=n * self.matrices, parts=parts)

    def runs(self, n: int) -> Cost:
        """``n`` runs with one set of weights."""
        if n == 1:
            return self
        return Cost(
            self.params,
            self.matrices,
            n * self.flops,
            n * self.kv,
            self.layers,
            n * self.passes,
            self.scores,
            self._each(lambda _, part: part.runs(n)),
        )

    def copies(self, n: int) -> Cost:
        """``n`` blocks in a row, each with its own weights; ``parts`` become their sums."""
        if n == 1:
            return self
        return Cost(
            n * self.params,
            n * self.matrices,
            n * self.flops,
            n * self.kv,
            n * self.layers,
            n * self.passes,
            n * self.scores,
            self._each(lambda _, part: part.copies(n)),
        )

    def _each(self, change: Callable[[str, Cost], Cost]) -> Mapping[str, Cost]:
        if not self.parts:  # most often: costs are asked for thousands of times in a search
            return NO_PARTS
        return {name: change(name, part) for name, part in self.parts.items()}


def linear(tokens: int, *sizes: tuple[int, int]) -> Cost:
    """Matrices without bias, each applied to ``tokens`` tokens."""
    weights = sum(n_in * n_out for n_in, n_out in sizes)
    return Cost(params=weights, matrices=weights, flops=2 * tokens * weights)


def vectors(n: int) -> Cost:
    """Parameters that are multiplied or added element by element."""
    return Cost(params=n)


def sequence_cost(
    spec: ModelSpec,
    *,
    tokens: int | None = None,
    routing: Routing = "expected",
    detailed: bool = False,
) -> Cost:
    """The whole model on one sequence of ``tokens`` (default: the context)."""
    T, D, V = tokens or spec.context, spec.dim, spec.vocab_size
    scope = Scope(D, T, T, routing=routing, detailed=detailed)
    head = linear(T, (D, V))
    parts = {"embedding": Cost(params=V * D, matrices=V * D)}
    for i, block in enumerate(spec.blocks):
        parts[f"blocks.{i}"] = block.cost(scope)
    parts["norm"] = vectors(D * (2 if spec.norm == "layer" else 1))
    parts["head"] = Cost(flops=head.flops) if spec.tie_embeddings else head
    return scope.together(parts)


@dataclass(frozen=True)
class Receipt:
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
    expected, T = sequence_cost(spec), spec.context
    lightest = heaviest = sequence_cost(spec, routing="none").flops
    if lightest != expected.flops:  # something routes, and so selects a token at least
        heaviest = sequence_cost(spec, routing="all").flops
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
    base = float(f"{2 * (whole.matrices + tied) * T + whole.scores:.2e}")
    return base * (whole.passes / (whole.layers * T) if whole.layers else 1.0)


verbs.callable_by_name(__name__)
