"""What a pass really cost: the closed form, at the shares of tokens that the routers selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import cast

from archdsl.costs.receipt import sequence_cost
from archdsl.lang.spec import BlockSpec, ModelSpec, Part, Path
from archdsl.model.language_model import LanguageModel
from archdsl.model.parts import changed, loops_by_path
from archdsl.nn.loop import Loop, Step

ALMOST_ALL = 1 - 1e-12  # a share of 1 would mean that there is no router to be paid for


def flops_per_token(model: LanguageModel, tokens: int) -> float:
    """Forward FLOPs per token of the model's last pass, over sequences of ``tokens``.

    The share of a loop inside another loop is that of all its runs together. The capacities count
    for steps that have not run, and before the first pass.
    """
    return sequence_cost(executed(model), tokens=tokens).flops / tokens


def executed(model: LanguageModel) -> ModelSpec:
    """The spec as the model ran it: steps as dialled, capacities as measured."""
    spec = model.spec.with_copies()
    return with_measured(spec, loops_by_path(spec, model), model.router_shares())


def with_measured(
    spec: ModelSpec, loops: Mapping[Path, Sequence[Loop]], shares: Mapping[str, float]
) -> ModelSpec:
    """``spec`` with the passes of ``loops``, at the ``shares`` that their routers selected.

    ``loops``: by their place in the spec. Where one place was built as several copies, each pass
    takes the mean of their shares. ``shares``: by the name of the routed step.
    """

    def as_run(path: Path, part: Part) -> Part:
        if path not in loops:
            return part
        copies = loops[path]
        taken = [
            _share([one.routed for one in copies_of_pass], shares)
            for copies_of_pass in zip(*(loop.passes for loop in copies), strict=True)
        ]
        return copies[0].as_run(cast(BlockSpec, part), taken)

    return changed(spec, as_run)


def _share(steps: Sequence[Step | None], shares: Mapping[str, float]) -> float:
    """The share of tokens that takes a pass, in the mean over copies of a loop."""
    routed = [step for step in steps if step is not None]
    if not routed:
        return 1.0
    measured = [shares[step.name] for step in routed if step.name in shares]
    return min(fmean(measured or [step.capacity for step in routed]), ALMOST_ALL)
