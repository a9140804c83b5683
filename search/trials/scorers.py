"""How a draw is scored: what work gives it a score on each task, rung by rung."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from archdsl.costs.receipt import sequence_cost
from archdsl.lang.spec import ModelSpec
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore
from archdsl.search.workers.pool import Work


class Scorer(Protocol):
    """``rungs``: how often a draw is scored before it is known."""

    @property
    def rungs(self) -> int: ...

    def job(
        self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int
    ) -> Work[ProxyScore]: ...


@dataclass(frozen=True)
class SeparateTraining:
    """Every draw is trained for itself."""

    proxy: Proxy
    store: Path
    seed: int

    @property
    def rungs(self) -> int:
        return self.proxy.rungs

    def job(self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int) -> Job:
        trained = self.proxy.tasks[task]
        small = self.proxy.shrink(spec, trained)
        return trained.job(self.store, small, self.seed, trained.rungs[rung])


def training_flops(proxy: Proxy, spec: ModelSpec) -> float:
    """Of training the proxy of a spec on all tasks, up to the last rung; by the closed form."""
    return sum(
        3 * _flops(proxy.shrink(spec, task), task.context) * task.batch_size * task.rungs[-1]
        for task in proxy.tasks.values()
    )


def _flops(spec: ModelSpec, tokens: int) -> int:
    return sequence_cost(spec, tokens=tokens).flops
