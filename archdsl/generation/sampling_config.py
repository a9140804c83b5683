"""The settings of sampling. This module does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from archdsl.lang.strict import Size, Strict

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Sampling(Strict):
    """How the next token is chosen, and how many tokens are generated.

    Equal seeds give equal tokens, whether a prompt is continued alone or in a batch.
    """

    max_tokens: Size = Field(200, ge=1, description="the largest number of new tokens")
    temperature: Finite = Field(
        0.8,
        ge=0,
        description="divides the logits: below 1, likely tokens become more likely; 0 always takes "
        "the most likely token",
    )
    top_k: Size | None = Field(
        None, ge=1, description="sample among this many most likely tokens; default: all"
    )
    top_p: Finite | None = Field(
        None,
        gt=0,
        le=1,
        description="sample from the smallest set of tokens whose probability is at least this; "
        "default: all",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the seed of the sampling")
