"""Everything that decides a search besides its space: as options, as a YAML file, as keywords.

The command line, ``search --config FILE`` and `archdsl.search` share the names, the words in which
values may be given and the errors. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from archdsl.errors import describe
from archdsl.lang.strict import Size, Strict, validation_error

if TYPE_CHECKING:
    from archdsl.lang.spec import Budget

SECONDS = 540.0  # a search with its start takes less than ten minutes
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: object) -> float:
    """``90``, ``90s``, ``10m``, ``1.5h`` or ``2d`` in seconds. Raises ValueError."""
    seconds = 0.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", value)
        seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"must be a time such as 90s, 10m or 1.5h, got {value!r}")
    return seconds


def _duration(value: Any) -> Any:
    return value if value is None else parse_duration(value)


def _path(value: Any) -> Any:
    if value is None:
        return value
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"must be the path of a folder, got {describe(value)}")
    return Path(value)


def _comma_separated(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


Duration = Annotated[float, BeforeValidator(_duration)]
Folder = Annotated[Path, BeforeValidator(_path)]


class SearchConfig(Strict):
    """The settings of a search. Each field is an option of ``archdsl search``."""

    space: str = Field(
        "search", description="a spec file, or a shipped one, that leaves values open"
    )
    budget: Size | None = Field(
        None, ge=1, description="most parameters of a model, for example 162M"
    )
    budget_of: Literal["params", "non_embedding"] | None = Field(
        None,
        description="what the budget counts: all parameters, or those outside embedding and head; "
        "default: params",
    )
    flops: Size | None = Field(
        None, ge=1, description="most forward FLOPs per token of a model, for example 0.8G"
    )
    kv: Size | None = Field(
        None, ge=1, description="most bytes of KV cache per token of a model, for example 64KiB"
    )
    train_flops: Size | None = Field(
        None,
        ge=1,
        description="most FLOPs that all workers together spend on training, for example 1P",
    )
    time: Duration | None = Field(
        SECONDS,
        description="start no new training after this long, for example 30m; null: no limit; "
        "default: 9m",
    )
    trials: Size | None = Field(
        None, ge=1, description="train at most this many trials; default: no limit"
    )
    objective: Annotated[str, BeforeValidator(_comma_separated)] = Field(
        "loss,flops",
        description="minimise loss alone, or the front of loss and costs: loss,flops,kv",
    )
    strategy: Literal["separate", "shared"] = Field(
        "separate",
        description="how trials are scored; separate: train each alone; shared: train one supernet "
        "for all steps and capacities of a layout, and score trials with its weights",
    )
    layouts: int = Field(4, ge=1, description="number of supernets that the strategy shared trains")
    proxy: str | None = Field(
        None,
        description="sizes of the small model that is trained in place of each model, such as "
        "dim=32,head_size=16,repeat=1,steps=300; none: train the model itself; default: dim=32",
    )
    data: str | None = Field(
        None,
        description="train on this text, JSONL or parquet file or folder, hf:DATASET/CONFIG or "
        "skill:NAME; default: the embedded corpus and a skill",
    )
    workers: int | None = Field(
        None, ge=1, description="number of workers; default: as many as there are devices for"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu",
        description="kind of device that trials are trained on; cpu: each core is a device; "
        "cuda: each GPU",
    )
    devices_per_trial: int = Field(
        1,
        ge=1,
        description="number of devices that train each trial together; a worker has one process "
        "of one thread for each",
    )
    memory: Size | None = Field(
        None,
        ge=1,
        description="most memory that a process of a worker may allocate, for example 4GiB; "
        "default: no limit",
    )
    patience: Duration = Field(
        120.0,
        description="fail a trial whose training makes no step for this long; default: 2m",
    )
    seed: int = Field(0, ge=0, description="seed of the sampler and of the training of trials")
    seeds: int = Field(
        3, ge=2, description="number of further seeds with which winner and baselines are trained"
    )
    validate_proxy: bool = Field(
        False,
        description="train eight trials again at twice the width, and say whether the ranking "
        "holds there; takes about a third of the default time",
    )
    window: int = Field(
        8, ge=1, description="number of trials that may be running at once, over all machines"
    )
    out: Folder | None = Field(
        None, description="folder of the search; default: a folder below runs/"
    )
    store: Folder | None = Field(
        None,
        description="folder of trained proxies, which searches may share; default: inside the "
        "folder of the search",
    )
    storage: str | None = Field(
        None,
        description="database by which many machines search together, such as "
        "postgresql+psycopg://user@host/name; default: a file in the folder of the search",
    )
    heartbeat: int = Field(
        30,
        ge=1,
        description="seconds between two heartbeats in the database; a trial that misses two is "
        "stale and failed",
    )

    @model_validator(mode="after")
    def _counts_something(self) -> Self:
        try:
            self.limits  # noqa: B018  raises ValueError
        except ValueError as error:
            raise validation_error([(("budget_of",), str(error))]) from None
        return self

    @property
    def limits(self) -> Budget | None:
        """The limits that are given; None if there are none."""
        from archdsl.lang.config import budget_of_limits  # not for the options alone

        return budget_of_limits(self.budget, self.flops, self.kv, self.budget_of, self.train_flops)
