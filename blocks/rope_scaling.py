"""How rotary frequencies are slowed down for contexts longer than trained on.

Shapes: F pairs of one head's elements, half its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.lang.spec import Part, Path
from archdsl.lang.strict import Size

if TYPE_CHECKING:
    from torch import Tensor


class RopeScalingSpec(Part):
    """How a model came to a longer context than it was first trained on."""

    family: ClassVar[str] = "rope_scaling"

    def slowed(self, freq_F: Tensor) -> Tensor:
        """The frequencies [F] for the longer context, from those before it."""
        raise NotImplementedError


class LinearSpec(RopeScalingSpec):
    """Every rotary frequency over ``factor``: position interpolation, Chen et al. 2306.15595."""

    example: ClassVar = {"kind": "linear", "factor": 2}

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1, le=2**20, description="how many times longer the context is")

    def slowed(self, freq_F: Tensor) -> Tensor:
        """All frequencies divided by ``factor``."""
        return freq_F / self.factor


class Llama3Spec(RopeScalingSpec):
    """The slow rotary frequencies over ``factor``, the fast ones kept: Grattafiori 2407.21783.

    The formula is that of Meta's and transformers' code; it is in no paper.
    """

    example: ClassVar = {"kind": "llama3", "factor": 8, "original_context": 8192}

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1, le=2**20, description="what the slow ones are divided by")
    low_freq_factor: float = Field(
        1.0, gt=0, description="slow: this many turns in the original context, or fewer"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="fast: this many turns, or more; between the two it is blended"
    )
    original_context: Size = Field(ge=1, le=2**30, description="the context of the first training")

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """Factors that leave no room between low and high frequencies."""
        low, high = self.low_freq_factor, self.high_freq_factor
        if low >= high:
            yield ("high_freq_factor",), f"must be above low_freq_factor {low:g}, got {high:g}"

    def slowed(self, freq_F: Tensor) -> Tensor:
        """Low frequencies divided by ``factor``, high ones unchanged, and a transition between."""
        turns_F = self.original_context / (2 * math.pi / freq_F)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
        return (1 - kept_F) * freq_F / self.factor + kept_F * freq_F
