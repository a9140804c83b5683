"""The costs of a model in closed form: parameters, FLOPs and cache, in total and node by node.

The conventions are those of `archdsl.costs.bill`. A backward pass costs two forward passes of what
gets a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from archdsl.costs.bill import Bill, Cost, Runs

if TYPE_CHECKING:
    from archdsl.lang.spec import BlockSpec, ModelSpec


def block_cost(block: BlockSpec, dim: int, tokens: int) -> Cost:
    """Returns the costs of one block of a model of width ``dim`` on ``tokens`` tokens."""
    bill = _bill(dim, tokens)
    block.cost(bill)
    return bill.total()


def sequence_cost(spec: ModelSpec, *, tokens: int | None = None, detailed: bool = False) -> Cost:
    """Returns the costs of a model on one sequence of ``tokens`` (by default the context).

    ``detailed``: also the costs of every part.
    """
    D, V = spec.dim, spec.vocab_size
    bill = _bill(D, tokens or spec.context, detailed, V)
    bill.part("embedding").tables += V * D
    for i, block in enumerate(spec.blocks):
        block.cost(bill.part(f"blocks.{i}"))
    if spec.final_norm:
        bill.part("norm").vectors += D * (2 if spec.norm == "layer" else 1)
    head = bill.part("head")
    head.matrices += V * D
    if spec.tie_embeddings:
        head.tables -= V * D  # the matrix of the embedding, which is already counted there
    return bill.total()


def _bill(dim: int, tokens: int, detailed: bool = False, vocabulary: int = 0) -> Bill:
    """The bill of one sequence in which all tokens attend to each other."""
    whole = Runs([tokens], tokens * tokens)
    return Bill(dim, tokens, detailed, "", whole, whole, vocabulary=vocabulary)


def train_flops(spec: ModelSpec, *, tokens: int | None = None) -> float:
    """Returns the expected FLOPs of training on one sequence, forward and backward.

    The mean is over the depths that the training of the spec draws, and over its capacities. Where
    only the last passes of its loops get a gradient, the backward pass costs as much as that of a
    model with these alone. Where every pass has a loss, so many heads are counted.
    """

    if spec.training and spec.training.capacity:
        levels = spec.training.capacity.levels().items()
        return sum(part * train_flops(spec.opened(share), tokens=tokens) for share, part in levels)

    def forward(at: ModelSpec) -> int:
        return sequence_cost(at, tokens=tokens).flops

    spec = spec.as_trained()
    law, depths = spec.depth_law, spec.training_depths
    head = 2 * spec.vocab_size * spec.dim * (tokens or spec.context)
    if law is None:
        return 3 * (forward(spec) + head * (spec.training_losses(None) - 1))
    total = 0
    for depth in depths:
        learning = min(depth, law.backprop_last or depth)
        total += forward(spec.at_depth(depth)) + 2 * forward(spec.at_depth(learning))
        total += 3 * head * (spec.training_losses(depth) - 1)
    return total / len(depths)


class Receipt(NamedTuple):
    """What a spec costs; FLOPs are forward unless they say otherwise.

    ``active``: the parameters that one token uses, which are fewer where there are experts.
    ``lightest``/``expected``/``heaviest`` are FLOPs per token, averaged over the context, of a
    token that no router selects, at the routers' capacities, and that every router selects.
    ``train_flops_per_token``: see `train_flops`.
    ``kv_bytes_per_token``: what a cache holds after the context, over its tokens.
    ``state_bytes``: what a cache holds besides for each sequence, however long it is, such as the
    state of a recurrence. ``weight_bytes``, ``gradient_bytes`` and ``optimizer_bytes`` are those of
    all parameters in training; fewer gradients exist at the peak of a step's memory.
    """

    params: int
    active: int
    matrices: int
    non_embedding: int
    context: int
    lightest: float
    expected: float
    heaviest: float
    flops_per_context: int
    train_flops_per_token: float
    kv_bytes_per_token: float
    state_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


KV_BYTES = 2  # caches are in bfloat16
TRAIN_BYTES = 4  # weights, gradients and the two moments of AdamW are in float32


def cost(spec: ModelSpec) -> Receipt:
    """Returns the costs of a spec, computed in closed form.

    >>> import archdsl
    >>> receipt = archdsl.cost(archdsl.load("transformer"))
    >>> f"{receipt.matrices / 1e6:.1f}M"
    '162.0M'
    """
    whole, T = sequence_cost(spec), spec.context
    tables = spec.vocab_size * spec.dim * (1 if spec.tie_embeddings else 2)
    return Receipt(
        params=whole.params,
        active=whole.params - whole.idle,
        matrices=whole.matrices,
        non_embedding=whole.params - tables,
        context=T,
        lightest=whole.lightest / T,
        expected=whole.flops / T,
        heaviest=whole.heaviest / T,
        flops_per_context=whole.flops,
        train_flops_per_token=train_flops(spec) / T,
        kv_bytes_per_token=KV_BYTES * whole.kv / T,
        state_bytes=KV_BYTES * whole.state,
        weight_bytes=TRAIN_BYTES * whole.params,
        gradient_bytes=TRAIN_BYTES * whole.params,
        optimizer_bytes=2 * TRAIN_BYTES * whole.params,
    )


def paper_flops(spec: ModelSpec, tokens: int | None = None) -> float:
    """Returns the forward FLOPs of one sequence as Chen et al. (2502.13842, Table 2) count them.

    The base is ``2 N T + 4 T^2 d L``, where N are all parameters in matrices, also the embedding.
    It is rounded to three digits, as in the table, and then multiplied by the mean number of passes
    per layer. So embedding and head are multiplied too, although they run once. The values 3.29,
    4.42 and 4.70 of the table require that the base is rounded first.
    """
    T = tokens or spec.context
    whole = sequence_cost(spec, tokens=T)
    tied = spec.vocab_size * spec.dim if spec.tie_embeddings else 0
    used = whole.matrices - whole.idle
    base = float(f"{2 * (used + tied) * T + 4 * T**2 * whole.queries:.2e}")
    return base * (whole.passes / (whole.layers * T) if whole.layers else 1.0)
