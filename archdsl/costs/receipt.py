"""What a model costs, in closed form: parameters, FLOPs and cache, node by node.

The conventions are those of `archdsl.costs.bill`; a backward pass costs two forward passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from archdsl.costs.bill import Bill, Cost, Runs

if TYPE_CHECKING:
    from archdsl.lang.spec import BlockSpec, ModelSpec


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
