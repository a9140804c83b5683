"""The proxy: a model of the same structure, small enough to train in seconds, and its score.

Results are files named after what was trained, so that equal models are trained once, and a search
that is killed and run again loses at most the rung that was being climbed.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from archdsl import __version__
from archdsl.build import build
from archdsl.checkpoint import load_training, load_weights, save_checkpoint
from archdsl.cost import sequence_cost
from archdsl.data import Data, load_data
from archdsl.errors import ArchdslError
from archdsl.files import write_text
from archdsl.schedule import TrainConfig
from archdsl.search.curve import Curve
from archdsl.search.scoring import Held, held_out
from archdsl.search.store import Place
from archdsl.spec import ModelSpec, Sizes, Strict
from archdsl.trainer import Step, Trainer, TrainingDiverged

SECONDS_APART = 30.0  # of the states that are kept on the way to a rung


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


def _as_tuples(value: Any) -> Any:
    """JSON has lists."""
    return tuple(map(tuple, value)) if isinstance(value, list | tuple) else value


class Score(Strict):
    """Held-out quality of a proxy after ``steps``; causal, also where training leaks.

    What was spent is what this rung added to the one below. ``reused``: it was read back, so the
    call that returned it has spent nothing.
    """

    steps: int
    loss: float | None = Field(description="nats per prediction; null: training diverged")
    accuracy: float | None
    bits_per_byte: float | None
    leak: float = Field(0.0, description="how much lower the loss is with sight of the future")
    seconds: float = Field(description="spent")
    train_flops: float = Field(0.0, description="spent: three forward passes of the closed form")
    eval_flops: float = Field(0.0, description="spent by scoring")
    flops_per_token: float | None = Field(None, description="forward, executed, when scored")
    shares: dict[str, float] = Field({}, description="of tokens selected, by loop and step")
    entropies: dict[str, float] = Field({}, description="of selecting a token, in bits")
    curve: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_as_tuples)] = Field(
        (), description="training: step, mean loss since the point before"
    )
    peak_bytes: int = Field(0, description="of memory, of the process")
    accumulate: int = Field(1, description="parts that each batch was cut into")
    reused: bool = Field(False, exclude=True)


@dataclass
class Progress:
    """What is kept beside a state: its curve, and what was spent since the last score."""

    curve: Curve = field(default_factory=Curve)
    seconds: float = 0.0
    train_flops: float = 0.0


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

    def smaller(self) -> Job | None:
        """With half as many sequences at once."""
        halved = 2 * self.accumulate
        return None if self.task.batch_size % halved else replace(self, accumulate=halved)

    @property
    def config(self) -> TrainConfig:
        update = {"steps": self.steps, "accumulate": self.accumulate}
        return self.task.config(self.seed).model_copy(update=update)

    @property
    def place(self) -> Place:
        """Where the score is; not a matter of how far to train, nor in how many parts."""
        training = self.config.model_dump(mode="json", exclude={"steps", "accumulate"})
        data = self.task.load()
        return Place(
            self.store,
            {
                "archdsl": __version__,
                "model": self.spec.canonical().model_dump(mode="json"),
                "data": {"name": data.name, "fingerprint": data.fingerprint},
                "training": training,
            },
        )

    def known(self) -> Score | None:
        """The score, if this was done before."""
        file = self.place.score(self.steps)
        if not file.exists():
            return None
        score = Score.model_validate_json(file.read_text(encoding="utf-8"))
        return score.model_copy(update={"reused": True})

    def run(self, beat: Callable[[], None]) -> Score:
        """Climbs to the rung from where training stands; waits while another process does."""
        with self.place.locked(beat):
            return self.known() or Climb(self, beat).score()


class Climb:
    """A training on its way to a rung."""

    def __init__(self, job: Job, beat: Callable[[], None]) -> None:
        self.started = self.saved = time.perf_counter()
        self.job, self.beat, self.place = job, beat, job.place
        model = build(job.spec.canonical(), seed=job.seed)  # equal specs, equal bits and names
        self.trainer = Trainer(model, job.task.load(), job.config)
        self.progress = Progress()
        self.furthest = self._resume()
        sequence = self.trainer.data.batch(0, 1, job.task.context, job.seed).tokens_BT
        self.step_flops = 3 * job.task.batch_size * _flops(job.spec, sequence.size(1))

    def _resume(self) -> bool:
        """Goes on from the state, if there is one; False if that is beyond the rung."""
        if not self.place.state.exists():
            return True
        state = load_training(self.place.state)
        if state["step"] > self.job.steps:
            return False
        load_weights(self.place.state, self.trainer.model)
        self.trainer.restore(state)
        progress = state["progress"]
        self.progress.curve = Curve(**progress["curve"])
        if not self.place.score(state["step"]).exists():
            self.progress.seconds = progress["seconds"]
            self.progress.train_flops = progress["train_flops"]
        return True

    def score(self) -> Score:
        """Trains, scores, and writes the score where it will be found."""
        try:
            self.trainer.run(self.job.steps, self._after_step)
            self._save()
            score = self._scored(held_out(self.trainer, self.beat))
        except TrainingDiverged:
            score = Score(loss=None, accuracy=None, bits_per_byte=None, **self._spent())
        write_text(self.place.score(self.job.steps), score.model_dump_json())
        return score

    def _after_step(self, step: Step) -> None:
        self.beat()
        self.progress.curve.add(step.step, step.loss)
        self.progress.train_flops += self.step_flops
        if time.perf_counter() - self.saved > SECONDS_APART:
            self._save()

    def _save(self) -> None:
        """The state, unless there is one that went further."""
        if not self.furthest:
            return
        spent = replace(self.progress, seconds=self._seconds())
        save_checkpoint(
            self.place.state,
            self.trainer.model,
            tokenizer_from=None,
            provenance={"step": self.trainer.step},
            training=self.trainer.state() | {"progress": asdict(spent)},
        )
        self.saved = time.perf_counter()

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self.started

    def _spent(self) -> dict[str, Any]:
        """What a score says of the training, whatever became of it."""
        return {
            "steps": self.job.steps,
            "seconds": self._seconds(),
            "train_flops": self.progress.train_flops,
            "curve": self.progress.curve.up_to(self.trainer.step),
            "peak_bytes": _peak_bytes(),
            "accumulate": self.job.accumulate,
        }

    def _scored(self, found: Held) -> Score:
        as_trained, meter = found.evaluation, found.meter
        honest = as_trained.causal or as_trained
        return Score(
            loss=honest.loss,
            accuracy=honest.accuracy,
            bits_per_byte=honest.bits_per_byte,
            leak=honest.loss - as_trained.loss,
            eval_flops=meter.flops * (2 if as_trained.causal else 1),
            flops_per_token=meter.flops_per_token,
            shares=meter.shares,
            entropies=found.health.entropies,
            **self._spent(),
        )


def _flops(spec: ModelSpec, tokens: int) -> int:
    """Of one forward pass over a sequence."""
    return sequence_cost(spec, tokens=tokens).flops


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
