"""How a text is continued, as data. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from archdsl.lang.spec import Strict

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Sampling(Strict):
    """How a text goes on. Equal seeds choose the same tokens, in a batch as alone."""

    max_tokens: int = Field(200, ge=1, description="tokens to add at most")
    temperature: Finite = Field(
        0.8, ge=0, description="below 1 likely tokens get likelier; 0: always the likeliest"
    )
    top_k: int | None = Field(None, ge=1, description="choose among so many; default: all")
    top_p: Finite | None = Field(
        None,
        gt=0,
        le=1,
        description="choose among the likeliest that reach this share together; default: all",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the choices")
