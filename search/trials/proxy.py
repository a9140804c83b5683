"""The proxy: a model of the same structure, small enough to train in seconds, and its score.

Results are files named after what was trained, so that equal models are trained once, and a search
that is killed and run again loses at most the rung that was being climbed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from archdsl import __version__
from archdsl.data.loading import Data, load_data
from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec, Sizes, Strict
from archdsl.model.build import build
from archdsl.search.trials.proxy_training import ProxyScore, ProxyTraining, read_score
from archdsl.search.trials.result_store import StoredRun
from archdsl.training.config import TrainConfig
from archdsl.training.trainer import Trainer

__all__ = ["Job", "Proxy", "ProxyError", "ProxyScore", "Task", "default_tasks", "objective"]


LOADED: dict[tuple[str | None, str], Data] = {}  # in this process, by name and tokenizer


class ProxyError(ArchdslError):
    """A proxy that was asked for in words that mean nothing."""

    exit_status = 2


class Task(Strict):
    """One of the things a proxy is judged on, and how it is trained for it."""

    data: str | None = Field(None, description="as --data; null: the embedded corpus")
    tokenizer: str = "bytes"
    context: int = Field(128, ge=2)
    batch_size: int = Field(16, ge=1)
    rungs: tuple[int, ...] = Field(description="steps trained when the proxy is scored")
    lr: float = 3e-3
    eval_tokens: int = 65_536
    weight: float = Field(1.0, ge=0, description="of its loss in the objective")

    def load(self) -> Data:
        key = self.data, self.tokenizer
        if key not in LOADED:
            LOADED[key] = load_data(self.data, tokenizer=self.tokenizer)
        return LOADED[key]

    def __reduce__(self) -> tuple[Any, ...]:
        """Its data crosses processes with it: to identify a large text takes long."""
        return _with_data, (dict(self), self.load())

    def up_to(self, steps: int) -> Task:
        """The same rungs in proportion, ending at ``steps``."""
        rungs = tuple(max(1, steps * rung // self.rungs[-1]) for rung in self.rungs)
        return self.model_copy(update={"rungs": rungs})

    def config(self, seed: int) -> TrainConfig:
        """A constant rate, so that a rung does not depend on how many are above it."""
        return TrainConfig(
            steps=self.rungs[-1],
            context=self.context,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="constant",
            warmup_steps=50,
            seed=seed,
            eval_tokens=self.eval_tokens,
            device="cpu",
        )


def _with_data(fields: dict[str, Any], data: Data | None) -> Task:
    task = Task(**fields)
    if data is not None:  # its files are still there
        LOADED[task.data, task.tokenizer] = data
    return task


class Proxy(Strict):
    """Sizes that a spec is brought down to, and the tasks that it is then trained on."""

    dim: int | None = Field(32, ge=1, description="width; null: the spec stays as it is")
    head_size: int = Field(16, ge=2)
    repeat: int = Field(1, ge=1, description="copies of a stack's body, at most")
    tasks: dict[str, Task]

    @classmethod
    def parse(cls, text: str | None = None, data: str | None = None) -> Proxy:
        """``none`` or ``dim=64,repeat=2,steps=1000``; ``data`` takes the place of both tasks."""
        tasks = default_tasks()
        if data is not None:
            task = tasks["skill" if data.startswith("skill:") else "text"]
            tasks = {"data": task.model_copy(update={"data": data, "weight": 1.0})}
        if text == "none":
            return cls(dim=None, tasks=tasks)
        given = dict(_sizes(part, text) for part in text.split(",")) if text else {}
        if steps := given.pop("steps", None):
            tasks = {name: task.up_to(steps) for name, task in tasks.items()}
        return cls(**given, tasks=tasks)

    @property
    def rungs(self) -> int:
        return min(len(task.rungs) for task in self.tasks.values())

    def shrink(self, spec: ModelSpec, task: Task) -> ModelSpec:
        """The spec as it is trained on a task; without ``dim`` the spec itself."""
        if self.dim is None:
            return spec
        vocab_size = task.load().vocab_size
        return spec.resized(Sizes(self.dim, task.context, vocab_size, self.head_size, self.repeat))


def _sizes(part: str, text: str) -> tuple[str, int]:
    name, _, value = part.partition("=")
    if name not in ("dim", "head_size", "repeat", "steps") or not re.fullmatch(r"\d{1,6}", value):
        raise ProxyError(
            f"--proxy {text}: {part!r} is not understood; write none, or some of "
            "dim=32,head_size=16,repeat=1,steps=300"
        )
    return name, int(value)


def default_tasks() -> dict[str, Task]:
    """Real text, and a skill that needs depth; docs/log.md has the measurements behind both."""
    return {
        "text": Task(context=128, batch_size=16, rungs=(50, 100)),
        "skill": Task(
            data="skill:p-hop,hops=3,length=32,alphabet=4",
            context=32,
            batch_size=32,
            rungs=(100, 300),
            eval_tokens=32_768,
            weight=0.15,  # both noises alike: 0.013 nats of text are as sure as 0.088 of the skill
        ),
    }


@dataclass(frozen=True)
class Job:
    """Train one proxy on one task up to a rung; plain data, so that it can cross processes.

    ``store``: the folder in which equal jobs find each other's scores. ``accumulate``: parts that
    each batch is cut into to save memory.
    """

    store: Path
    spec: ModelSpec
    task: Task
    seed: int
    steps: int
    accumulate: int = 1

    def smaller(self) -> Self | None:
        """With half as many sequences at once."""
        halved = 2 * self.accumulate
        return None if self.task.batch_size % halved else replace(self, accumulate=halved)

    @property
    def config(self) -> TrainConfig:
        update = {"steps": self.steps, "accumulate": self.accumulate}
        return self.task.config(self.seed).model_copy(update=update)

    @property
    def stored_run(self) -> StoredRun:
        """Where the score is; not a matter of how far to train, nor in how many parts."""
        data, model = self.task.load(), self.spec.canonical()
        identity = {
            "archdsl": __version__,
            "model": model.model_dump(mode="json"),
            "data": data.fingerprint,
            "training": self.config.model_dump(mode="json", exclude={"steps", "accumulate"}),
        }
        return StoredRun(
            self.store, identity, description={"name": self.spec.name, "data_name": data.name}
        )

    def stored_score(self) -> ProxyScore | None:
        """The score, if this was done before."""
        return read_score(self.stored_run.score(self.steps))

    def run(self, heartbeat: Callable[[], None]) -> ProxyScore:
        """Climbs to the rung from where training stands; waits while another process does."""
        stored_run = self.stored_run
        with stored_run.locked(heartbeat):
            if stored := read_score(stored_run.score(self.steps)):
                return stored
            # equal specs, equal bits and names
            model = build(self.spec.canonical(), seed=self.seed)
            return ProxyTraining(
                stored_run, Trainer(model, self.task.load(), self.config), heartbeat
            ).score()


def objective(scores: dict[str, ProxyScore], proxy: Proxy) -> float | None:
    """The weighted sum of the tasks' losses, in nats; None if one diverged.

    Weights are inverse to each task's noise between seeds: see docs/log.md.
    """
    total = 0.0
    for name, task in proxy.tasks.items():
        loss = scores[name].loss
        if loss is None:
            return None
        total += task.weight * loss
    return total
