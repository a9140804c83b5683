"""Where a training stood: what a checkpoint keeps of it, and the check that nothing is missing.

A state is a mapping of names to tensors and JSON values. The tensors are what the
optimizer keeps of each parameter, its moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from archdsl.errors import describe
from archdsl.evaluation.evaluate import Evaluation
from archdsl.lang.messages import explain
from archdsl.lang.strict import Strict
from archdsl.model.checkpoint import TENSORS, TRAINING, CheckpointError
from archdsl.nn.ranks import local

PREFIX = "optimizer/"

S = TypeVar("S", bound=Strict)


def _mapping(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping, got {describe(value)}")
    return value


class TrainingState(Strict):
    """The JSON values of a state, without those that its writer checks alone.

    ``absurd_steps``: the steps in a row with a far too high loss. ``made_by``: what decides the
    bits of the run. ``without_moments``: the parameters that no gradient has reached so far.
    """

    model_config = ConfigDict(extra="ignore")

    step: int = Field(ge=0, description="the number of optimizer steps")
    tokens: int = Field(ge=0, description="the number of tokens read")
    lowest_loss: float = Field(description="the lowest loss so far, in nats")
    absurd_steps: int = Field(ge=0, description="steps in a row with a far too high loss")
    made_by: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field(
        description="the spec, the config and the data of the run"
    )
    without_moments: list[str] = Field(
        [], description="the parameters that no gradient has reached so far"
    )


class FinishedState(TrainingState):
    """The state of a run that has reached its last step."""

    validation: Evaluation = Field(description="the evaluation after the last step")


def checked(kind: type[S], state: Mapping[str, Any], path: Path) -> S:
    """Return the JSON values of a state that was read from the checkpoint ``path``.

    Raises CheckpointError if one is missing or cannot be.
    """
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        field, why = explain(error, kind.model_fields)[0]
        raise CheckpointError(f"{path / TRAINING}: {'.'.join(map(str, field))}: {why}") from None


def moments(
    state: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    kept: Mapping[str, tuple[str, ...]],
    stood: TrainingState,
    path: Path,
) -> dict[str, dict[str, Tensor]]:
    """Return the moments of each parameter that has some, by its name.

    ``kept``: the names of the moments that the optimizer keeps of each of the ``parameters``.
    Raises CheckpointError, which names the tensor, unless they are there as they can be after
    ``stood.step`` steps.
    """
    left = {key for key in state if key.startswith(PREFIX)}
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        if name in stood.without_moments:
            continue
        keys = {moment: f"{PREFIX}{name}/{moment}" for moment in kept[name]}
        found[name] = {
            moment: _tensor(state, key, parameter if moment != "step" else None, path)
            for moment, key in keys.items()
        }
        _check_values(found[name], keys, stood.step, path)
        left -= set(keys.values())
    _refuse_others(left, path)
    return found


def empty_moments(
    parameters: Mapping[str, Tensor], kept: Mapping[str, tuple[str, ...]], stood: TrainingState
) -> dict[str, Tensor]:
    """Return tensors for the moments in a checkpoint, divided among processes as the parameters.

    ``kept``: the names of the moments of each parameter.
    """
    return {
        f"{PREFIX}{name}/{moment}": torch.zeros(()) if moment == "step" else torch.zeros_like(one)
        for name, one in parameters.items()
        if name not in stood.without_moments
        for moment in kept[name]
    }


def _tensor(state: Mapping[str, Any], key: str, like: Tensor | None, path: Path) -> Tensor:
    """Return the tensor ``key`` if it is like a parameter, or a single number if that is None."""
    tensor = state.get(key)
    if not isinstance(tensor, Tensor):
        _refuse(path, key, "is missing, and without it other weights would be trained")
    shape = [] if like is None else list(like.shape)
    if list(tensor.shape) != shape:
        _refuse(path, key, f"has the shape {list(tensor.shape)}, and must have {shape}")
    dtype = torch.float32 if like is None else like.dtype
    if tensor.dtype != dtype:
        _refuse(path, key, f"is of type {_name(tensor.dtype)}, and must be of {_name(dtype)}")
    if not local(tensor).isfinite().all():
        _refuse(path, key, "has values that are not finite")
    return tensor


def _check_values(
    found: Mapping[str, Tensor], keys: Mapping[str, str], step: int, path: Path
) -> None:
    if "step" in found and not 1 <= (count := float(found["step"])) <= step:
        _refuse(path, keys["step"], f"is {count:g}, and must be 1 to {step}")
    if "exp_avg_sq" in found and (local(found["exp_avg_sq"]) < 0).any():
        _refuse(path, keys["exp_avg_sq"], "has values below 0, and is a mean of squares")


def _refuse_others(keys: Iterable[str], path: Path) -> None:
    for key in sorted(keys):
        _refuse(path, key, "is unexpected: it belongs to no parameter that this run trains")


def _refuse(path: Path, key: str, why: str) -> NoReturn:
    raise CheckpointError(f"{path / TENSORS}: {key} {why}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
