"""Parameters of the passes of a loop that share a body: a low-rank difference for each pass.

Relaxed Recursive Transformers (Bae et al. 2410.20672, section 2.3) add to each matrix W of the
shared body a low-rank difference (LoRA, Hu et al. 2106.09685) of its own in each pass t:

    W x + alpha / rank * B(t) A(t) x

A has ``rank`` rows and starts from N(0, 1 / inputs), B has ``rank`` columns and starts from 0, so
at first the loop equals one with ``parameters: shared``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema
from pydantic_core import PydanticCustomError

from archdsl.errors import describe, did_you_mean
from archdsl.lang.spec import Part, PerStep, Sizes
from archdsl.lang.strict import Strict

WORDS = ("shared", "per_step")


class ParametersSpec(Part):
    """How the passes of a loop differ in their parameters, beyond ``shared`` and ``per_step``."""

    family: ClassVar[str] = "parameters"


class LoraSpec(ParametersSpec):
    """Each pass adds a low-rank difference of its own to every matrix of the shared body."""

    example: ClassVar = {"kind": "lora", "rank": [0, 2, 3], "alpha": 4}

    kind: Literal["lora"] = "lora"
    rank: PerStep[Annotated[int, Field(ge=0, le=4096)]] = Field(
        (8,),
        min_length=1,
        max_length=64,
        description="rank of the difference in each pass; 0: the pass has none",
    )
    alpha: float = Field(
        8.0, gt=0, le=4096, description="the difference is multiplied by alpha / rank"
    )

    def resized(self, old: Sizes, new: Sizes) -> Self:
        """Ranks that take the same shares of the width, but at least 1.

        With a fixed rank the passes of a narrow proxy would differ by far more than those of the
        model: rank 32 of width 32 is a matrix of its own for each pass. The first rank above 0
        keeps its scale, alpha / rank.
        """
        ranks = tuple(rank and max(1, round(rank * new.dim / old.dim)) for rank in self.rank)
        first = next((i for i, rank in enumerate(ranks) if rank), None)
        alpha = self.alpha if first is None else self.alpha * ranks[first] / self.rank[first]
        return self.model_copy(update={"rank": ranks, "alpha": alpha})

    def at(self, step: int) -> int:
        """The rank of pass ``step``; passes beyond the last one have the rank of that."""
        return self.rank[min(step, len(self.rank) - 1)]


class _Named(Strict):
    """The notation ``{lora: {rank: 8}}``."""

    lora: LoraSpec


def _parameters(value: Any) -> Any:
    """Reads a word, ``{kind: lora, rank: 8}``, or ``{lora: {rank: 8}}``, which means the same."""
    match value:
        case LoraSpec():
            return value
        case str() if value in WORDS:
            return value
        case {"lora": _}:
            return _Named.model_validate(value).lora
        case Mapping():
            return LoraSpec.model_validate(value)
    hint = did_you_mean(value, WORDS) if isinstance(value, str) else ""
    message = f"must be {', '.join(WORDS)} or {{lora: {{rank: 8}}}}, got {describe(value)}{hint}"
    raise PydanticCustomError("archdsl", "{message}", {"message": message})


KIND: Any = {"x-family": "parameters"}
SHORT: Any = {
    "type": "object",
    "properties": {"lora": KIND | {"x-default": "lora"}},
    "required": ["lora"],
    "additionalProperties": False,
}
ParametersType = Annotated[
    Literal["shared", "per_step"]
    | Annotated[SerializeAsAny[LoraSpec], WithJsonSchema({"anyOf": [KIND, SHORT]})],
    BeforeValidator(_parameters),
]
