"""What a study's storage must hold, checked before anything is read from it.

The names of the fields are those of the first release.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from optuna.trial import FrozenTrial, TrialState
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, create_model

from archdsl.errors import describe
from archdsl.lang.messages import explain
from archdsl.lang.strict import Strict
from archdsl.search.study.storage import StorageError
from archdsl.search.trials.proxy import Proxy, ProxyScore

S = TypeVar("S", bound=Strict)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("must be the text of a JSON list")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("must be the text of a JSON list") from None


class Stored(Strict):
    """The base of what other versions may have written with further fields."""

    model_config = ConfigDict(extra="ignore")


class StoredTrial(Stored):
    """The attributes of an attempt at a trial. ``draw``: the number of the trial."""

    draw: int = Field(ge=0)
    fingerprint: str
    spec: str = ""
    outcome: Literal[
        "", "complete", "pruned", "diverged", "failed", "infeasible", "invalid", "reused"
    ] = ""
    error: str = ""
    same_as: int | None = Field(None, ge=0)
    rungs: Annotated[list[dict[str, ProxyScore]], BeforeValidator(_parsed)] = Field([])
    losses: list[float] = Field([])
    others: list[float] = Field([])


class StoredSpent(Strict):
    """The spending of a process in a phase."""

    seconds: float = Field(ge=0)
    train_flops: float = Field(ge=0)
    eval_flops: float = Field(ge=0)
    jobs: int = Field(ge=0)


# the spending of a process between two times, in seconds since the epoch
WORKER: dict[str, Any] = {"from": float, "to": float, "phases": dict[str, StoredSpent]}
StoredWorker = create_model("StoredWorker", __base__=Stored, **WORKER)


def _axes(value: Any) -> Any:
    if not isinstance(value, list) or value[:1] != ["loss"] or not all(value):
        raise ValueError(f"must be a list of names that begins with loss, got {describe(value)}")
    return value


class StoredSettings(Stored):
    """What is read from the settings of a search. ``objective``: the axes, the loss first."""

    objective: Annotated[list[str], BeforeValidator(_axes)]


class SearchSettings(StoredSettings):
    """What is read from the settings of a search to train its winner again."""

    proxy: Proxy
    data: dict[str, str]
    seed: int = Field(ge=0)


class FolderSettings(StoredSettings):
    """What is read from the settings.json of a search."""

    name: str = Field(min_length=1)


class StoredNoise(Stored):
    """What is read of the noise in the result of a search."""

    sentence: str


class StoredResult(Stored):
    """What is read from the result of a search."""

    name: str
    verdict: str
    trust_sentence: str
    costs_sentence: str = ""
    noise: StoredNoise | None = None


def checked(kind: type[S], value: Any, where: str) -> S:
    """Return ``value`` as what a storage must hold there. Raises StorageError if it is not."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        path, why = explain(error, kind.model_fields)[0]
        field = f"{'.'.join(map(str, path))}: " if path else ""
        raise StorageError(f"{where}: {field}{why}") from None


def check_attempts(attempts: Iterable[FrozenTrial], axes: tuple[str, ...], where: str) -> None:
    """Raise StorageError unless these are attempts at the trials 0, 1, 2 and so on of a search."""
    numbers = set()
    for attempt in attempts:
        at = f"{where}: trial record {attempt.number}"
        found = checked(StoredTrial, attempt.user_attrs, at)
        if found.same_as is not None and found.same_as >= found.draw:
            raise StorageError(f"{at}: same_as: must be below {found.draw}, its own number")
        _check_outcome(attempt, found, at)
        if attempt.state == TrialState.COMPLETE:
            _check_complete(attempt, found, axes, at)
        numbers.add(found.draw)
    if missing := set(range(len(numbers))) - numbers:
        raise StorageError(f"{where}: trial {min(missing)} is missing")


def _check_outcome(attempt: FrozenTrial, found: StoredTrial, at: str) -> None:
    """An attempt that failed may have any outcome: its worker may have died at any time."""
    if attempt.state == TrialState.PRUNED and found.outcome in ("", "complete", "failed"):
        raise StorageError(f"{at}: outcome: must say why it ended early, got {found.outcome!r}")
    if attempt.state == TrialState.COMPLETE and found.outcome != "complete":
        raise StorageError(f"{at}: outcome: must be complete, got {found.outcome!r}")


def _check_complete(
    attempt: FrozenTrial, found: StoredTrial, axes: tuple[str, ...], at: str
) -> None:
    if attempt.values is None or len(attempt.values) != len(axes):
        raise StorageError(f"{at}: values: must be {len(axes)} numbers, for {', '.join(axes)}")
    if not found.rungs or not all(rung.keys() == found.rungs[0].keys() for rung in found.rungs):
        raise StorageError(f"{at}: rungs: must be the scores of the same tasks on each rung")
    if not found.spec:
        raise StorageError(f"{at}: spec: is required for a trial that is complete")


def check_attributes(attributes: Mapping[str, Any], where: str) -> None:
    """Raise StorageError if the spending of a process is not what a search writes."""
    for key, value in attributes.items():
        if key.startswith("worker/"):
            checked(StoredWorker, value, f"{where}: {key}")
