"""The settings of a training run, and the learning-rate schedule.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from archdsl.errors import describe
from archdsl.lang.strict import Size, Strict, validation_error

Finite = Annotated[float, Field(allow_inf_nan=False)]

# Settings that older versions did not have: their runs had the default. So records of a setting at
# its default are the same with it and without it.
LATER_SETTINGS = {"optimizer", "log", "loss_per_step", "peak_flops", "profile", "parallel"}

LOGGERS = ("tensorboard", "wandb", "trackio")


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"must be a list of two numbers, got {describe(value)}")
    return tuple(value)


def _loggers(value: Any) -> Any:
    named = [value] if isinstance(value, str) else value
    if not isinstance(named, list | tuple):
        raise ValueError(f"must be some of {', '.join(LOGGERS)}, got {describe(value)}")
    for name in named:
        if name not in LOGGERS:
            raise ValueError(f"must be some of {', '.join(LOGGERS)}, got {describe(name)}")
    return tuple(named)


class TrainConfig(Strict):
    """All settings of a training run, apart from the model and the data.

    The defaults suit models of 0.1M to 10M parameters that train for minutes on a few CPU cores.
    Betas, clipping and weight decay are those of GPT-3 (Brown et al. 2005.14165). The learning rate
    is higher, as small models allow. The validation loss on the bytes of the embedded corpus, at
    learning rates of 1e-3 / 3e-3 / 1e-2, was 2.25 / 1.99 / 1.79 with 0.13M parameters after 0.5M
    tokens, and 2.11 / 1.94 / 2.02 with 1M parameters after 0.25M tokens. Above 100M parameters,
    3e-4 is usual.
    """

    steps: Size = Field(1000, ge=1, description="optimizer steps")
    batch_size: Size = Field(16, ge=1, description="sequences per optimizer step")
    context: Size | None = Field(None, ge=1, description="tokens per sequence; default: the spec's")
    accumulate: int = Field(
        1, ge=1, description="split each batch into this many parts, to save memory"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon, which is for the matrices of the blocks and leaves the rest "
        "to adamw",
    )
    lr: Finite = Field(3e-3, gt=0, description="the highest learning rate")
    min_lr_ratio: Finite = Field(
        0.1, ge=0, le=1, description="the last learning rate, divided by the highest"
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="schedule of the learning rate; wsd (warmup, stable, decay) is constant and "
        "then falls linearly",
    )
    warmup_steps: Size | None = Field(
        None,
        ge=0,
        description="steps in which the learning rate rises; default: a tenth of the steps, at "
        "most 100",
    )
    decay_share: Finite = Field(
        0.2, gt=0, le=1, description="share of the steps in which wsd decays"
    )
    weight_decay: Finite = Field(
        0.1, ge=0, description="weight decay of the matrices of blocks and head"
    )
    betas: Annotated[
        tuple[
            Annotated[Finite, Field(ge=0, lt=1)],
            Annotated[Finite, Field(ge=0, lt=1)],
        ],
        BeforeValidator(_pair),
    ] = Field((0.9, 0.95), description="decay rates of the two moments of AdamW")
    clip: Finite | None = Field(
        1.0, gt=0, description="largest norm of the gradient; null: no limit"
    )
    only: Literal["all", "new"] = Field(
        "all", description="which parameters to train; new: those that a retrofit added"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of the weights and of the order of the data"
    )
    eval_every: Size = Field(
        200, ge=0, description="steps between validations; 0: validate only after the last step"
    )
    eval_tokens: Size | None = Field(
        32_768, ge=1, description="tokens of a validation, for example 8k; null: all"
    )
    checkpoint_every: Size = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints to keep")
    log_every: Size = Field(10, ge=1, description="steps between the lines of metrics.jsonl")
    log: Annotated[tuple[str, ...], BeforeValidator(_loggers)] = Field(
        (),
        description="where the figures go besides metrics.jsonl: tensorboard, wandb or trackio, or "
        "a list of them; default: nowhere",
    )
    loss_per_step: bool = Field(
        False,
        description="at each validation, also measure the loss on one batch with the last loop "
        "ended after each of its steps",
    )
    peak_flops: Size | None = Field(
        None,
        ge=1,
        description="FLOPs per second that the device can reach, for example 989T, of which mfu is "
        "the share; default: known for some cards in bfloat16",
    )
    profile: Size = Field(
        0,
        ge=0,
        description="write a trace of so many steps, after two to warm up, to profile/ in the "
        "folder of the run; 0: none",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|(cuda|xpu|mps)(:\d+)?)$",
        description="auto: cuda, xpu or mps if there is one, else cpu",
    )
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="how processes that torchrun starts share a model: ddp: each has a copy; fsdp: "
        "each has a part; hsdp: those of one machine have a copy together; auto: ddp where a "
        "quarter of the memory is enough, else fsdp, or hsdp on several machines",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="data type of the arithmetic; auto: bfloat16 on cuda and xpu, else float32",
    )
    compile: bool = Field(
        False,
        description="compile the layers; on a CPU this takes up to two minutes and saves at most "
        "6% of the time of a step",
    )
    activation_checkpointing: bool = Field(
        False,
        description="recompute the activations in the backward pass: 0.2 x the memory of the "
        "activations, 1.25 x the time",
    )

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Self:
        if self.batch_size % self.accumulate:
            found = f"{self.accumulate} and {self.batch_size}"
            message = f"accumulate must divide batch_size, got {found}"
            raise validation_error([(("accumulate",), message)])
        return self

    @classmethod
    def with_later(cls, recorded: Mapping[str, Any], exclude: set[str]) -> dict[str, Any]:
        """Return the settings that a run recorded, with those that its version did not have.

        ``exclude``: settings that runs do not record.
        """
        later = LATER_SETTINGS - exclude
        return {name: cls.model_fields[name].default for name in later} | dict(recorded)

    def identity(self, exclude: set[str]) -> dict[str, Any]:
        """Return the settings as JSON values, as the first version would record this run."""
        fields = type(self).model_fields
        later = {n for n in LATER_SETTINGS if getattr(self, n) == fields[n].default}
        return self.model_dump(mode="json", exclude=exclude | later)

    @property
    def warmup(self) -> int:
        """The number of steps in which the learning rate rises."""
        given = self.warmup_steps
        return usual_warmup(self.steps) if given is None else given

    @property
    def steps_before_decay(self) -> int:
        """The number of steps of wsd after which the learning rate falls."""
        return max(0, self.steps - max(1, round(self.decay_share * self.steps)))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of update number ``step``, counted from 0.

        It is constant from the last step of the run on.
        """
        return self.lr * min(self._warmup(step), self._decay(step))

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup))

    def _decay(self, step: int) -> float:
        last = self.steps - 1
        if self.schedule == "cosine":
            shape = (1 + math.cos(math.pi * _share(step, max(0, self.warmup - 1), last))) / 2
        elif self.schedule == "wsd":  # linear decay: Hägele et al. 2405.18392
            shape = 1 - _share(step, self.steps_before_decay - 1, last)
        else:
            shape = 1.0
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape


def usual_warmup(steps: int) -> int:
    """The number of steps in which the learning rate rises, where none is given."""
    return min(100, steps // 10)


def _share(step: int, start: int, end: int) -> float:
    """Return where ``step`` lies between ``start`` (0.0) and ``end`` (1.0)."""
    return min(1.0, max(0, step - start) / max(1, end - start))
