"""The proxy: a model of the same structure, small enough to train in seconds, and its score.

Results are files named after what was trained, so that equal models are trained once, and a search
that is killed and run again loses at most the rung that was being climbed.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import Field

from archdsl.build import build
from archdsl.data import Data, load_data
from archdsl.errors import ArchdslError
from archdsl.evaluate import Evaluation
from archdsl.files import remove_folder, write_text
from archdsl.schedule import TrainConfig
from archdsl.spec import ModelSpec, Sizes, Strict
from archdsl.trainer import Trainer, TrainingDiverged


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
        return _load(self.data, self.tokenizer)

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


@cache
def _load(data: str | None, tokenizer: str) -> Data:
    return load_data(data, tokenizer=tokenizer)


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
            tasks = {"data": task.model_copy(update={"data": data})}
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
    """Real text, and a skill that needs depth; docs/LOG.md has the measurements behind both."""
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
    """Train one proxy on one task up to a rung; plain data, so that it can cross processes."""

    folder: Path
    spec: ModelSpec
    task: Task
    seed: int
    steps: int

    @property
    def result(self) -> Path:
        """The file that holds the score once there is one."""
        return self.folder / f"step-{self.steps:06d}.json"


class Score(Strict):
    """Held-out quality of a proxy after ``steps``; causal, also where training leaks."""

    steps: int
    loss: float | None = Field(description="nats per prediction; null: training diverged")
    accuracy: float | None
    bits_per_byte: float | None
    leak: float = Field(0.0, description="how much lower the loss is with sight of the future")
    seconds: float = Field(description="spent on this rung")


def run(job: Job) -> Score:
    """Climbs to the rung, from the last checkpoint on; what was scored before is read back."""
    if job.result.exists():
        return Score.model_validate_json(job.result.read_text())
    started = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    model = build(job.spec, seed=job.seed)
    trainer = Trainer(model, job.task.load(), job.task.config(job.seed))
    state = job.folder / "state"
    if state.exists():
        trainer.load(state)
    try:
        trainer.run(job.steps)
        score = _score(trainer.evaluate(), job.steps, time.perf_counter() - started)
    except TrainingDiverged:
        score = Score(
            steps=job.steps,
            loss=None,
            accuracy=None,
            bits_per_byte=None,
            seconds=time.perf_counter() - started,
        )
    if job.steps < job.task.rungs[-1]:
        trainer.save(state)
    elif state.exists():
        remove_folder(state)
    write_text(job.result, score.model_dump_json())
    return score


def _score(evaluation: Evaluation, steps: int, seconds: float) -> Score:
    honest = evaluation.causal or evaluation
    return Score(
        steps=steps,
        loss=honest.loss,
        accuracy=honest.accuracy,
        bits_per_byte=honest.bits_per_byte,
        leak=honest.loss - evaluation.loss,
        seconds=seconds,
    )


def objective(scores: dict[str, Score], proxy: Proxy) -> float | None:
    """The weighted sum of the tasks' losses, in nats; None if one diverged.

    Weights are inverse to each task's noise between seeds: see docs/LOG.md.
    """
    total = 0.0
    for name, task in proxy.tasks.items():
        loss = scores[name].loss
        if loss is None:
            return None
        total += task.weight * loss
    return total
