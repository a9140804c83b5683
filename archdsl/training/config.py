"""How a model is trained, as data, and the learning rate of each step. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from archdsl.lang.spec import Strict

Finite = Annotated[float, Field(allow_inf_nan=False)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TrainConfig(Strict):
    """Everything that decides a training run besides model and data.

    The defaults suit 0.1-10M parameters on a few CPU cores: minutes, not hours. Betas, clipping
    and decay are GPT-3's; small models stand a far higher rate. Measured on the embedded corpus,
    bytes, validation loss at 1e-3 / 3e-3 / 1e-2: 0.13M parameters after 0.5M tokens 2.25 / 1.99 /
    1.79, 1M after 0.25M tokens 2.11 / 1.94 / 2.02. Beyond 100M 3e-4 is usual.
    """

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step")
    context: int | None = Field(None, ge=1, description="tokens per sequence; default: the spec's")
    accumulate: int = Field(1, ge=1, description="parts a batch is cut into to save memory")
    lr: Finite = Field(3e-3, gt=0, description="highest learning rate")
    min_lr_ratio: Finite = Field(0.1, ge=0, le=1, description="last learning rate / highest")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="of the learning rate; wsd: constant, then down in a line"
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="default: a tenth of the steps, at most 100"
    )
    decay_share: Finite = Field(0.2, gt=0, le=1, description="share of the steps that wsd decays")
    weight_decay: Finite = Field(0.1, ge=0, description="of matrices alone")
    betas: Annotated[
        tuple[
            Annotated[Finite, Field(ge=0, lt=1)],
            Annotated[Finite, Field(ge=0, lt=1)],
        ],
        BeforeValidator(_as_tuple),
    ] = Field((0.9, 0.95), description="of AdamW's two moments")
    clip: Finite | None = Field(1.0, gt=0, description="highest norm of the gradient")
    only: Literal["all", "new"] = Field(
        "all", description="which parameters; new: those that a retrofit added"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights and of the order of the data")
    eval_every: int = Field(200, ge=0, description="steps between validations; 0: only the last")
    eval_tokens: int | None = Field(32_768, ge=1, description="of a validation; null: all")
    checkpoint_every: int = Field(200, ge=1, description="steps that a crash can cost at most")
    keep_last: int = Field(2, ge=1, description="checkpoints kept")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto: cuda if there is one, else cpu",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the arithmetic; auto: bfloat16 on cuda, else float32"
    )
    compile: bool = Field(False, description="at most 6% faster on a CPU, after up to two minutes")
    activation_checkpointing: bool = Field(
        False, description="0.2 x the activations, 1.25 x the time"
    )

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size, got {self.accumulate} and {self.batch_size}"
            )
        return self

    @property
    def warmup(self) -> int:
        given = self.warmup_steps
        return min(100, self.steps // 10) if given is None else given

    def learning_rate(self, step: int) -> float:
        """Of the update after ``step`` others; from the last one on it stays the same."""
        return self.lr * min(self._warmup(step), self._decay(step))

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup))

    def _decay(self, step: int) -> float:
        last = self.steps - 1
        if self.schedule == "cosine":
            shape = (1 + math.cos(math.pi * _share(step, max(0, self.warmup - 1), last))) / 2
        elif self.schedule == "wsd":  # linear, as in MiniCPM's successors: arXiv 2405.18392
            shape = 1 - _share(step, last - max(1, round(self.decay_share * self.steps)), last)
        else:
            shape = 1.0
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape


def _share(step: int, start: int, end: int) -> float:
    """How much of the way from start to end is done, within 0 and 1."""
    return min(1.0, max(0, step - start) / max(1, end - start))
