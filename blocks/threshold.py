"""Routers that keep the quantiles of their scores from training.

    threshold  selects scores above the threshold that the wanted share exceeded in training
    top_k      the highest scores of the sequence, as in the paper (Chen et al. 2502.13842). A
               selection depends on later tokens. Decodes by threshold
    predictor  trains as top_k; a second matrix learns to predict that choice from the token alone
               (Raposo et al. 2404.02258, section 3.5), which selects outside training

There are quantiles for every share, so any capacity can be set after training.

Shapes: B batch, T tokens, K selected tokens, D width, R routed steps, Q quantiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.blocks.router import LearnedSpec
from archdsl.costs.activations import Footprint, Rows
from archdsl.costs.bill import Bill

if TYPE_CHECKING:
    from archdsl.blocks.modules.threshold import Predictor, Threshold, TopK


class ThresholdSpec(LearnedSpec):
    """Scores above a threshold that follows the wanted share in training. Causal."""

    example: ClassVar = {"kind": "threshold", "capacity": 0.7}

    kind: Literal["threshold"] = "threshold"

    def build(self, dim: int, steps: list[int]) -> Threshold:
        """The torch module, with weights for the routed ``steps``."""
        from archdsl.blocks.modules.threshold import Threshold

        return Threshold(self, dim, steps)


class TopKSpec(LearnedSpec):
    """The best-scored share of the sequence, as in the paper. Sees the future."""

    leaks: ClassVar[bool] = True
    fills: ClassVar[bool] = False
    example: ClassVar = {"kind": "top_k", "capacity": 0.7}

    kind: Literal["top_k"] = "top_k"

    def build(self, dim: int, steps: list[int]) -> TopK:
        """The torch module, with weights for the routed ``steps``."""
        from archdsl.blocks.modules.threshold import TopK

        return TopK(self, dim, steps)


class PredictorSpec(LearnedSpec):
    """Trained as top_k; from then on a predictor of that choice chooses. Causal after training."""

    fills: ClassVar[bool] = False
    example: ClassVar = {"kind": "predictor", "capacity": 0.7}

    kind: Literal["predictor"] = "predictor"
    weight: float = Field(
        0.01, gt=0, le=100, description="of the predictor's own loss beside the model's"
    )

    def cost(self, bill: Bill, steps: int) -> None:
        """A second matrix and a bias, for the predictions."""
        bill.matrices += 2 * steps * bill.dim
        bill.vectors += steps

    def footprint(self, rows: Rows, chosen: Rows) -> Footprint:
        """Saved besides, for its own loss: the predictions, the targets, and a mask."""
        own = rows.floats(2) + (0 if rows.router_losses else rows.mask)
        return super().footprint(rows, chosen).plus(own)._replace(reads=True)

    def build(self, dim: int, steps: list[int]) -> Predictor:
        """The torch module, with weights for the routed ``steps``."""
        from archdsl.blocks.modules.threshold import Predictor

        return Predictor(self, dim, steps)
