"""Exits: when a token stops looping.

After each pass but the last, an exit adds to what it knows of each token; a token that has reached
the threshold takes no further pass of the loop. It keeps its state. What the tokens of later passes
see of it is what ``kv`` of the loop says: with ``own`` nothing, with ``shared`` its keys and values
of the first pass, with ``last`` those of its last pass.

    gate        a learned probability of stopping after each pass, lambda(t). The chance that a
                token has stopped by pass t is 1 - prod(1 - lambda(s), s <= t). Trained by the loss
                that is expected over the passes, with a prior on where tokens stop: Ouro (Zhu et
                al. 2510.25741), PonderNet (Banino et al. 2107.05407)
    halting     Adaptive Computation Time (Graves 1603.08983), for each token (Dehghani et al.
                1807.03819). A learned number h(t) after each pass; a token stops at the first pass
                N at which their sum reaches the threshold. The loop returns sum(p(t) * Y(t)), with
                p(t) = h(t) before N, and p(N) = R, what is left to 1
    confidence  no parameters: a token stops when the entropy of its next-token distribution, or the
                KL divergence from that of the pass before (Geiping et al. 2502.05171, section 6.1),
                is below the threshold

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from archdsl.costs.activations import Footprint, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import Part, Path, PerStep

if TYPE_CHECKING:
    from archdsl.blocks.modules.exit import Confidence, Exit, Gate, Halting


class ExitSpec(Part):
    """Decides after each pass of a loop which tokens take the next one."""

    family: ClassVar[str] = "exit"
    learned: ClassVar[bool] = True
    expects: ClassVar[bool] = False  # whether the loss is expected over the passes
    in_training: ClassVar[bool] = False  # whether tokens stop in training, too
    needs_readout: ClassVar[bool] = False  # whether it computes logits when the model is used
    thresholds: ClassVar[tuple[float, ...]] = ()  # a range of them, for sweeps of the dial

    most: ClassVar[float] = 1.0  # the largest threshold

    threshold: float
    remaining: PerStep[Annotated[float, Field(gt=0, le=1)]] = Field(
        (1.0,),
        min_length=1,
        max_length=64,
        description="share of all tokens that take each pass after the first, as the receipt is "
        "to count them; `eval` measures it",
    )

    @property
    def stops(self) -> bool:
        """Whether a token can stop before the last pass."""
        return self.stops_at(self.threshold)

    def stops_at(self, threshold: float) -> bool:
        """Whether a token can stop before the last pass at this threshold."""
        return True

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """Shares of remaining tokens that rise, or that are below 1 where no token stops."""
        if not self.stops and set(self.remaining) != {1.0}:
            yield (
                ("remaining",),
                f"must be 1, as no token stops at the threshold {self.threshold:g}; "
                f"got {list(self.remaining)}",
            )
        if list(self.remaining) != sorted(self.remaining, reverse=True):
            yield (
                ("remaining",),
                f"must not rise, as a token that stopped stays so; got {list(self.remaining)}",
            )

    def as_trained(self) -> ExitSpec | None:
        """Training computes every pass of every token; None where nothing is learned."""
        return self.model_copy(update={"remaining": (1.0,)}) if self.learned else None

    def cost(self, bill: Bill) -> None:
        """Adds one decision to the bill, which each of its runs makes."""
        raise NotImplementedError

    def footprint(self, rows: Rows, steps: int) -> Footprint:
        """The memory of all decisions of a loop in a training step.

        ``reads``: whether the state after each pass but the last is saved, too.
        """
        return Footprint(reads=False)

    def build(self, dim: int) -> Exit:
        """The torch module for width ``dim``."""
        raise NotImplementedError


class GateSpec(ExitSpec):
    """A learned probability of stopping after each pass; trained by the expected loss."""

    example: ClassVar = {"kind": "gate", "threshold": 0.6}
    reads_head: ClassVar[bool] = True
    expects: ClassVar[bool] = True
    thresholds: ClassVar[tuple[float, ...]] = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)

    kind: Literal["gate"] = "gate"
    threshold: float = Field(
        1.0,
        ge=0,
        le=1,
        description="a token stops when it has this chance to have stopped; 1: never",
    )
    prior: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="chance to stop at each pass under the geometric prior of PonderNet; default: "
        "the uniform prior of Ouro, which rewards the entropy of the exit distribution",
    )
    weight: float = Field(
        0.1, ge=0, le=100, description="of the divergence from the prior, beside the expected loss"
    )

    def canonical(self, dim: int) -> GateSpec:
        """The same without a prior that has no weight."""
        return self if self.weight else self.model_copy(update={"prior": None})

    def stops_at(self, threshold: float) -> bool:
        """Never at 1."""
        return threshold < 1

    def cost(self, bill: Bill) -> None:
        """A row of weights and a bias."""
        bill.matrices += bill.dim
        bill.vectors += 1

    def footprint(self, rows: Rows, steps: int) -> Footprint:
        """Saved: the logits and logarithms of the chances, to stop and to go on."""
        return Footprint(rows.floats(4 * (steps - 1) + 3 * steps))

    def build(self, dim: int) -> Gate:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.exit import Gate

        return Gate(self, dim)


class HaltingSpec(ExitSpec):
    """Adaptive Computation Time: the passes' states are averaged by learned weights."""

    example: ClassVar = {"kind": "halting", "threshold": 0.8}
    in_training: ClassVar[bool] = True
    thresholds: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 0.9, 0.99)

    kind: Literal["halting"] = "halting"
    threshold: float = Field(
        0.99, ge=0, le=1, description="a token stops when its numbers add up to this"
    )
    weight: float = Field(
        0.01, ge=0, le=100, description="of the ponder cost N + R per token, beside the loss"
    )

    def cost(self, bill: Bill) -> None:
        """A row of weights and a bias."""
        bill.matrices += bill.dim
        bill.vectors += 1

    def footprint(self, rows: Rows, steps: int) -> Footprint:
        """Saved: the last state, weights and sums, and which tokens stop or have stopped."""
        masks = 2 * steps * rows.batch * rows.tokens
        return Footprint(rows.stream + rows.floats(2 * steps - 1) + masks)

    def build(self, dim: int) -> Halting:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.exit import Halting

        return Halting(self, dim)


class ConfidenceSpec(ExitSpec):
    """Stops tokens whose next-token distribution is settled. Without parameters or training."""

    example: ClassVar = {"kind": "confidence", "measure": "entropy", "threshold": 1.0}
    most: ClassVar[float] = 100.0
    reads_head: ClassVar[bool] = True
    needs_readout: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    thresholds: ClassVar[tuple[float, ...]] = (1e-4, 1e-3, 1e-2, 0.1, 0.5, 2.0)

    kind: Literal["confidence"] = "confidence"
    measure: Literal["kl", "entropy"] = Field(
        "kl",
        description="kl: of the distribution from that of the pass before; entropy: of it alone",
    )
    threshold: float = Field(
        5e-4, ge=0, le=100, description="a token stops below this, in nats; 0: never"
    )

    def stops_at(self, threshold: float) -> bool:
        """Never at 0."""
        return threshold > 0

    def canonical(self, dim: int) -> ExitSpec | None:
        """None where no token stops."""
        return self if self.stops else None

    def cost(self, bill: Bill) -> None:
        """The head, whose parameters are counted where it stands."""
        bill.weights = 0
        bill.matrices += bill.dim * bill.vocabulary

    def build(self, dim: int) -> Confidence:
        """The torch module; it has no weights."""
        from archdsl.blocks.modules.exit import Confidence

        return Confidence(self)
