"""Ways to run a model that must give the same outputs, and how far the outputs differ.

    change    changing a later token changes no earlier output
    gradient  no earlier output has a gradient with respect to a later input
    decoding  decoding token by token with a cache gives the outputs of one pass
    prefill   so does a pass in chunks of any sizes
    padding   padding on the left, on the right or between tokens changes no other token's output

A router that sees later tokens decodes causally. So it also selects causally in the pass that
decoding is compared with.

Shapes: B batch, T tokens, D width, P rows that are changed from a place of their own on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Block

Kind = Literal["change", "gradient", "decoding", "prefill", "padding"]
LEAKS: tuple[Kind, ...] = ("change", "gradient")

TOLERANCE = 1e-9  # as a share of the largest output
VANISHED = 1e-290  # smaller numbers have fewer digits
ROWS = 2


class Gap(NamedTuple):
    """The largest difference of the outputs of two passes, and their largest output.

    They are nan if an output is not finite.
    """

    difference: float
    largest: float

    @property
    def share(self) -> float:
        """The difference as a share of the largest output; infinite where one is not finite."""
        if math.isnan(self.difference) or math.isnan(self.largest):
            return math.inf
        return self.difference / self.largest if self.largest > VANISHED else 0.0

    @property
    def holds(self) -> bool:
        """Whether the difference is within rounding."""
        return self.share <= TOLERANCE


@dataclass(frozen=True)
class Plan:
    """The random inputs of one trial: ``places`` rows of ``tokens`` tokens.

    Each row is changed from another token on.
    """

    tokens: int
    places: int
    seed: int = 0

    def rng(self, use: int = 0) -> torch.Generator:
        """A generator of random numbers; each ``use`` has its own, and inputs have the first."""
        return torch.Generator().manual_seed(2 * self.seed + use)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is checked: the whole model, or one of its blocks alone, on a random stream."""

    place: str
    model: LanguageModel
    block: Block | None = None

    def draw(self, rows: int, tokens: int, rng: torch.Generator) -> Tensor:
        """Random inputs: tokens [rows, tokens], or for a block a stream [rows, tokens, D]."""
        if self.block is None:
            return torch.randint(self.model.spec.vocab_size, (rows, tokens), generator=rng)
        shape = (rows, tokens, self.model.spec.dim)
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def another(self, x_BT: Tensor, rng: torch.Generator) -> Tensor:
        """Inputs that differ from these at every token."""
        drawn_BT = self.draw(x_BT.size(0), x_BT.size(1), rng)
        if self.block is not None:
            return drawn_BT
        vocab_size = self.model.spec.vocab_size
        return (x_BT + 1 + drawn_BT % (vocab_size - 1)) % vocab_size

    def run(
        self, x_BT: Tensor, mask_BT: Tensor | None = None, chunks: list[int] | None = None
    ) -> Tensor:
        """The outputs of one pass; with ``chunks``, of one pass for each chunk, with a cache."""
        with torch.no_grad(), self._alone():
            step = self.model if self.block is None else self.model.hidden
            if chunks is None:
                return step(x_BT, mask_BT)
            cache = self.model.new_cache(x_BT.size(1))
            masks = [None] * len(chunks) if mask_BT is None else mask_BT.split(chunks, 1)
            parts = zip(x_BT.split(chunks, 1), masks, strict=True)
            return torch.cat([step(part, mask, cache) for part, mask in parts], 1)

    def run_stream(self, x_BTD: Tensor) -> Tensor:
        """The outputs of one pass from an embedded stream, which allows gradients."""
        with self._alone():
            y_BTD = self.model.hidden(x_BTD)
        return self.model.head(self.model.norm(y_BTD)) if self.block is None else y_BTD

    def stream(self, rows: int, tokens: int, rng: torch.Generator) -> Tensor:
        """A random stream [rows, tokens, D]; for the whole model, embedded random tokens."""
        x_BT = self.draw(rows, tokens, rng)
        return self.model.embedding(x_BT) if self.block is None else x_BT

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block, the model runs this one block only, with the context it needs."""
        layers = self.model.layers
        if self.block is not None:
            self.model.layers = list(self.block.unrolled())
        try:
            yield
        finally:
            self.model.layers = layers


def gap(one: Tensor, other: Tensor) -> Gap:
    """How far two tensors of the same shape are apart at most."""
    if not one.numel():
        return Gap(0.0, 0.0)
    # max propagates nan, and infinity minus infinity is nan
    largest = torch.maximum(one.abs().max(), other.abs().max())
    return Gap(float((one - other).abs().max()), float(largest if largest.isfinite() else math.nan))


def change(subject: Subject, plan: Plan) -> Gap:
    """How much earlier outputs move when later tokens are changed."""
    if not plan.places:
        return Gap(0.0, 0.0)
    rng = plan.rng()
    place_P = _places(plan, rng)
    x_PT = subject.draw(plan.places, plan.tokens, rng)
    other_PT = subject.another(x_PT, rng)
    order_T = torch.arange(plan.tokens)
    before_PT = order_T < place_P.unsqueeze(1)
    y_PT = subject.run(x_PT)
    gaps = [gap(y_PT, y_PT)]
    for changed_PT in (order_T == place_P.unsqueeze(1), ~before_PT):
        mask_PT = changed_PT.view(*changed_PT.shape, *[1] * (x_PT.dim() - 2))
        moved_PT = subject.run(torch.where(mask_PT, other_PT, x_PT))
        gaps.append(gap(moved_PT[before_PT], y_PT[before_PT])._replace(largest=gaps[0].largest))
    return worst(gaps)


def gradient(subject: Subject, plan: Plan) -> Gap:
    """How large the gradients of earlier outputs with respect to later inputs are."""
    if not plan.places:
        return Gap(0.0, 0.0)
    rng = plan.rng()
    place_P = _places(plan, rng)
    x_PTD = subject.stream(plan.places, plan.tokens, rng).requires_grad_()
    before_PT = torch.arange(plan.tokens) < place_P.unsqueeze(1)
    y_PTD = subject.run_stream(x_PTD)
    weight_PTD = torch.randn(y_PTD.shape, generator=rng, dtype=y_PTD.dtype)
    asked = (y_PTD * weight_PTD)[before_PT].sum()
    (slope_PTD,) = torch.autograd.grad(asked, x_PTD, allow_unused=True, materialize_grads=True)
    later = slope_PTD[~before_PT]
    return gap(later, torch.zeros_like(later))._replace(largest=gap(slope_PTD, slope_PTD).largest)


def decoding(subject: Subject, plan: Plan) -> Gap:
    """How far decoding token by token with a cache is from one pass."""
    x_BT = subject.draw(ROWS, plan.tokens, plan.rng())
    with subject.model.causal_routing():
        whole_BT = subject.run(x_BT)
    return gap(subject.run(x_BT, chunks=[1] * plan.tokens), whole_BT)


def prefill(subject: Subject, plan: Plan) -> Gap:
    """How far a pass in chunks of random sizes is from one pass."""
    rng = plan.rng()
    x_BT = subject.draw(ROWS, plan.tokens, rng)
    with subject.model.causal_routing():
        whole_BT = subject.run(x_BT)
    return gap(subject.run(x_BT, chunks=_chunks(plan.tokens, rng)), whole_BT)


def padding(subject: Subject, plan: Plan) -> Gap:
    """How far a padded batch is from its rows alone, in one pass and in chunks."""
    rng, T = plan.rng(), plan.tokens
    x_BT, mask_BT = subject.draw(3, T, rng), torch.ones(3, T, dtype=torch.bool)
    cut = int(torch.randint(T, (), generator=rng))
    mask_BT[0, :cut] = False
    mask_BT[1, cut + 1 :] = False
    mask_BT[2, torch.randperm(T, generator=rng)[: T // 2]] = False
    padded_BT = subject.run(x_BT, mask_BT)
    gaps = [gap(padded_BT, padded_BT)]  # finite, also at the padding
    for x_T, mask_T, padded_T in zip(x_BT, mask_BT, padded_BT, strict=True):
        gaps.append(gap(padded_T[mask_T], subject.run(x_T[mask_T].unsqueeze(0))[0]))
    with subject.model.causal_routing():
        whole_BT = subject.run(x_BT, mask_BT)
    chunked_BT = subject.run(x_BT, mask_BT, _chunks(T, rng))
    return worst([*gaps, gap(chunked_BT, chunked_BT), gap(chunked_BT[mask_BT], whole_BT[mask_BT])])


def as_trained(subject: Subject, plan: Plan) -> Gap:
    """How far a pass is from decoding where routers see later tokens in the pass only."""
    x_BT = subject.draw(ROWS, plan.tokens, plan.rng())
    return gap(subject.run(x_BT, chunks=[1] * plan.tokens), subject.run(x_BT))


MEASURES: dict[Kind, Callable[[Subject, Plan], Gap]] = {
    "change": change,
    "gradient": gradient,
    "decoding": decoding,
    "prefill": prefill,
    "padding": padding,
}


def worst(gaps: list[Gap]) -> Gap:
    """The gap with the largest share."""
    return max(gaps, key=lambda one: (one.share, one.largest))


def _places(plan: Plan, rng: torch.Generator) -> Tensor:
    return torch.randperm(plan.tokens - 1, generator=rng)[: plan.places] + 1


def _chunks(tokens: int, rng: torch.Generator) -> list[int]:
    chunks: list[int] = []
    while left := tokens - sum(chunks):
        chunks.append(int(torch.randint(1, min(left, 12) + 1, (), generator=rng)))
    return chunks
