"""The proxy: a small model of the same structure that is trained in place of the full-size model.

The result store keeps scores in files named after what was trained. So equal models are trained
once, and a search that is killed and run again loses at most the rungs that were in training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, ValidationError

from archdsl import __version__
from archdsl.costs.receipt import cost
from archdsl.data.loading import Data, load_data
from archdsl.errors import ArchdslError
from archdsl.lang.messages import explain
from archdsl.lang.plugin_sources import plugin_digests
from archdsl.lang.source import Tree
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.lang.strict import Strict
from archdsl.model.build import build
from archdsl.nn.ranks import Ranks, joined
from archdsl.search.trials.proxy_training import ProxyScore, ProxyTraining, as_tuple, read_score
from archdsl.search.trials.result_store import StoredRun
from archdsl.search.workers.worker import Heartbeat
from archdsl.sizes import parse_size
from archdsl.training.config import TrainConfig
from archdsl.training.trainer import Trainer

__all__ = [
    "Job",
    "Proxy",
    "ProxyError",
    "ProxyScore",
    "Task",
    "default_tasks",
    "mean_shares",
    "objective",
]


class ProxyError(ArchdslError):
    """The text of ``--proxy`` is not understood."""

    exit_status = 2


@cache
def _load(source: str | None, tokenizer: str) -> Data:
    """Load data once per process, because computing the fingerprint of a large text is slow."""
    # the default gives way to the tokenizer of data that are tokenized already
    return load_data(source, tokenizer=None if tokenizer == "bytes" else tokenizer)


class Task(Strict):
    """The data that a proxy is trained and scored on, and how it is trained."""

    data: str | None = Field(None, description="as --data; null: the embedded corpus")
    tokenizer: str = "bytes"
    context: int = Field(128, ge=2)
    batch_size: int = Field(16, ge=1)
    rungs: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = Field(
        description="training steps after which a proxy is scored"
    )
    lr: float = 3e-3
    eval_tokens: int = 65_536
    early_eval_tokens: int = Field(
        0,
        ge=0,
        exclude_if=lambda tokens: not tokens,
        description="held-out tokens on which rungs below the last are scored; 0: eval_tokens",
    )
    held_out_every: int = Field(
        0,
        ge=0,
        exclude_if=lambda steps: not steps,
        description="training steps between two held-out losses on the way; 0: none",
    )
    weight: float = Field(1.0, ge=0, description="of its loss in the objective")
    device: str = Field("cpu", exclude_if=lambda it: it == "cpu", description="as of archdsl train")

    def load(self) -> Data:
        """Load the data, once per process. Raises DataError if it cannot be loaded."""
        return _load(self.data, self.tokenizer)

    @property
    def length(self) -> int:
        """The tokens of a sequence: those of a skill may be fewer than the context."""
        return self.load().batch(0, 1, self.context, 0).tokens_BT.size(1)

    def up_to(self, steps: int) -> Task:
        """Return the task with its rungs scaled so that the last one is ``steps``."""
        rungs = tuple(max(1, steps * rung // self.rungs[-1]) for rung in self.rungs)
        return self.model_copy(update={"rungs": rungs})

    def config(self, seed: int) -> TrainConfig:
        """Return the settings of the training up to the last rung.

        The learning rate is constant, so that a rung does not depend on how many follow it.
        """
        return TrainConfig(
            steps=self.rungs[-1],
            context=self.context,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="constant",
            warmup_steps=50,
            seed=seed,
            eval_tokens=self.eval_tokens,
            device=self.device,
        )

    def job(self, store: Path, spec: ModelSpec, seed: int, steps: int) -> Job:
        """Return the job that trains a spec of the proxy's size for ``steps``.

        ``store``: the folder of the result store. Raises DataError if the data cannot be loaded.
        """
        return Job(store, spec, self, self.load(), seed, steps)


class Proxy(Strict):
    """The sizes that a spec is reduced to, and the tasks that it is then trained on."""

    dim: int | None = Field(32, ge=1, description="width; null: the spec keeps its sizes")
    of_dim: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda dim: dim is None,  # as in settings of the first version
        description="width of the model that is trained at dim, others are in proportion; "
        "null: all are trained at dim",
    )
    head_size: int = Field(16, ge=2)
    repeat: int = Field(1, ge=1, description="at most so many copies of a stack's body")
    of_repeat: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda copies: copies is None,
        description="copies of a model that become repeat, others are in proportion; null: none",
    )
    tasks: dict[str, Task]

    @classmethod
    def parse(cls, text: str | None = None, data: str | None = None, device: str = "cpu") -> Proxy:
        """Return the proxy that ``--proxy``, ``--data`` and ``--device`` describe.

        ``text``: ``none`` or sizes such as ``dim=64,repeat=2,steps=1000``. ``data`` replaces the
        data of both default tasks by one task. Raises ProxyError if the text is not understood.
        """
        on = {"device": device}
        tasks = {name: task.model_copy(update=on) for name, task in default_tasks().items()}
        if data is not None:
            task = tasks["skill" if data.startswith("skill:") else "text"]
            tasks = {"data": task.model_copy(update={"data": data, "weight": 1.0})}
        if text == "none":
            return cls(dim=None, tasks=tasks)
        given = dict(_sizes(part, text) for part in text.split(",")) if text else {}
        if steps := given.pop("steps", None):
            tasks = {name: task.up_to(steps) for name, task in tasks.items()}
        try:
            return cls(**given, tasks=tasks)
        except ValidationError as error:
            found = explain(error, cls.model_fields)
            wrong = "; ".join(f"{'.'.join(map(str, path))}: {why}" for path, why in found)
            raise ProxyError(f"proxy: {text}: {wrong}") from None

    @property
    def rungs(self) -> int:
        """The number of rungs of the task that has the fewest."""
        return min(len(task.rungs) for task in self.tasks.values())

    def relative_to(self, model: ModelSpec) -> Proxy:
        """Return the proxy that trains ``model`` at ``dim``, and others in proportion."""
        if self.dim is None or self.of_dim:
            return self
        return self.model_copy(update={"of_dim": model.dim})

    def for_space(self, tree: Tree, model: ModelSpec) -> Proxy:
        """Return the proxy of a space: relative to ``model`` where it leaves the width open.

        Where a budget decides the widths, a model that spends parameters on something else is
        narrower than others, and so must be its proxy.
        """
        dim = tree.value.get("dim") if isinstance(tree.value, dict) else None
        is_open = dim is None or isinstance(dim, dict)
        return self.relative_to(model) if is_open else self

    def shrink(self, spec: ModelSpec, task: Task) -> ModelSpec:
        """Return the spec at the size at which it is trained on a task.

        The spec is unchanged if ``dim`` is None. Raises DataError if the data cannot be loaded.
        """
        if self.dim is None:
            return spec
        dim = max(1, round(self.dim * spec.dim / self.of_dim)) if self.of_dim else self.dim
        vocab_size = task.load().vocab_size
        sizes = Sizes(dim, task.context, vocab_size, self.head_size, self.repeat)
        return spec.resized(sizes, self.of_repeat)


def _sizes(part: str, text: str) -> tuple[str, int]:
    name, _, value = part.partition("=")
    try:
        size = parse_size(value)
    except ValueError:
        size = 0
    if name not in ("dim", "head_size", "repeat", "steps") or not 0 < size < 10**6:
        raise ProxyError(
            f"proxy: {text}: {part!r} is not understood; write none, or some of "
            "dim=32,head_size=16,repeat=1,steps=300; sizes may be written as 1k"
        )
    return name, size


def default_tasks() -> dict[str, Task]:
    """Return the default tasks: real text, and a skill that needs depth.

    docs/log.md has the measurements from which their settings follow.
    """
    return {
        "text": Task(context=128, batch_size=16, rungs=(25, 100), early_eval_tokens=8192),
        "skill": Task(
            data="skill:p-hop,hops=3,length=32,alphabet=4",
            context=32,
            batch_size=32,
            rungs=(75, 300),
            eval_tokens=32_768,
            early_eval_tokens=4096,
            weight=0.15,  # the loss varies between seeds by 0.013 nats on text, 0.088 on the skill
        ),
    }


@dataclass(frozen=True)
class Job:
    """Train one proxy on one task up to a rung. A job can be pickled and sent to a worker.

    ``store``: the folder of the result store. ``data``: the task's data; a worker receives the
    names of its files. ``accumulate``: the number of parts into which each batch is cut to save
    memory.
    """

    store: Path
    spec: ModelSpec
    task: Task
    data: Data | None
    seed: int
    steps: int
    accumulate: int = 1

    def smaller(self) -> Self | None:
        """Return the job with half as many sequences at once.

        The result is None if a batch cannot be cut further.
        """
        halved = 2 * self.accumulate
        return None if self.task.batch_size % halved else replace(self, accumulate=halved)

    @property
    def config(self) -> TrainConfig:
        """The settings of the training up to the steps of this job."""
        update = {"steps": self.steps, "accumulate": self.accumulate}
        return self.task.config(self.seed).model_copy(update=update)

    @property
    def horizon(self) -> int | None:
        """The steps that a schedule of capacities is a share of; None without a schedule.

        They are those of the last rung, so that the rungs are parts of one training.
        """
        training = self.spec.training
        return self.task.rungs[-1] if training and training.capacity else None

    def load(self) -> Data:
        """Return the data of the task. Raises DataError if it cannot be loaded."""
        return self.data or self.task.load()  # a worker gets None if the token cache was deleted

    @property
    def tokens(self) -> int | None:
        """The held-out tokens that the score is measured on, if they are fewer than in the end."""
        return (self.task.early_eval_tokens or None) if self.steps < self.task.rungs[-1] else None

    @property
    def stored_run(self) -> StoredRun:
        """Where the score is stored; the same for all ``steps`` and ``accumulate``."""
        data, model = self.load(), self.spec.canonical()
        identity = {
            "archdsl": __version__,
            "model": model.model_dump(mode="json"),
            "data": data.fingerprint,
            "training": self.config.identity(exclude={"steps", "accumulate"}),
            **plugin_digests(self.spec),
            **({"horizon": self.horizon} if self.horizon else {}),
            **({"held_out_every": every} if (every := self.task.held_out_every) else {}),
        }
        description = {"name": self.spec.name, "data_name": data.name}
        return StoredRun(self.store, identity, description)

    def stored_score(self) -> ProxyScore | None:
        """Return the score if an equal job has stored it; None otherwise."""
        return read_score(self.stored_run.score(self.steps, self.tokens))

    def run(self, heartbeat: Heartbeat) -> ProxyScore:
        """Train and score, starting from the state that the store has, if any.

        Waits while another process trains the same model. In a worker that is a group of processes
        all of them call this, and train one model together.
        """
        stored_run = self.stored_run
        with (
            joined(self.task.device, params=cost(self.spec).params) as ranks,
            _locked_by_first(stored_run, ranks, heartbeat),
        ):
            if stored := ranks.on_first(self.stored_score):
                return stored
            # equal specs get the same weights and the same names of modules
            model = build(self.spec.canonical(), seed=self.seed)
            trainer = Trainer(model, self.load(), self.config, horizon=self.horizon, ranks=ranks)
            every = self.task.held_out_every
            return ProxyTraining(stored_run, trainer, heartbeat, every, self.tokens).score()


@contextmanager
def _locked_by_first(stored_run: StoredRun, ranks: Ranks, heartbeat: Heartbeat) -> Iterator[None]:
    """Hold the lock of a run in the first process, for all of them."""

    def still_waiting() -> None:
        heartbeat()
        ranks.any(True)

    with ExitStack() as stack:
        if ranks.first:
            stack.enter_context(stored_run.locked(still_waiting))
            ranks.any(False)
        else:
            while ranks.any(False):  # no single wait is long, as torch ends a long one
                pass
        yield


def objective(scores: dict[str, ProxyScore], proxy: Proxy) -> float | None:
    """Return the weighted sum of the tasks' losses in nats; None if one training diverged.

    The weights are inverse to how much each task's loss varies between seeds: see docs/log.md.
    """
    total = 0.0
    for name, task in proxy.tasks.items():
        loss = scores[name].loss
        if loss is None:
            return None
        total += task.weight * loss
    return total


def mean_shares(scores: Collection[ProxyScore]) -> dict[str, float]:
    """Return the share of tokens that each router selected, as the mean over tasks."""
    names = dict.fromkeys(name for score in scores for name in score.shares)
    return {name: fmean(s.shares[name] for s in scores if name in s.shares) for name in names}
