"""Train a model in a folder that holds the log, the checkpoints and the trained model."""

from __future__ import annotations

import os
import re
import reprlib
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch import nn

from archdsl.data.types import Data
from archdsl.errors import ArchdslError
from archdsl.evaluation.evaluate import Evaluation
from archdsl.files import (
    exclusive,
    remove_folder,
    remove_leftovers,
    remove_temporary_files,
    write_text,
)
from archdsl.lang.load import Source
from archdsl.model.build import build
from archdsl.model.checkpoint import (
    TRAINING,
    Checkpoint,
    CheckpointError,
    load_training,
)
from archdsl.model.language_model import LanguageModel
from archdsl.nn.ranks import Ranks, joined
from archdsl.training.config import TrainConfig
from archdsl.training.loggers import JsonLog, open_loggers
from archdsl.training.profile import profile_of
from archdsl.training.progress import TrainProgress
from archdsl.training.state import FinishedState, checked
from archdsl.training.throughput import Throughput, peak_flops
from archdsl.training.trainer import RunMismatchError, Trainer, TrainingDiverged, TrainStep

__all__ = [
    "FolderInUseError",
    "RunMismatchError",
    "TrainConfig",
    "TrainResult",
    "TrainStep",
    "Trainer",
    "TrainingDiverged",
    "last_checkpoint",
    "train",
]


class FolderInUseError(ArchdslError):
    """Another process is training in the folder."""

    exit_status = 2


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    ``steps``: the number of optimizer steps. ``validation``: the evaluation after the last step.
    ``resumed_from``: the step of the checkpoint that this call started from; 0 without one.
    """

    model: LanguageModel
    steps: int
    validation: Evaluation
    resumed_from: int


def train(
    model: LanguageModel | Checkpoint | Source,
    data: Data,
    config: TrainConfig,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    record: str | None = None,
) -> TrainResult:
    """Train to the last step of the config, and validate.

    ``model``: a model; a spec, or anything that `archdsl.load` takes (its weights are initialised
    with the seed of the config); or a checkpoint (a new run starts from its weights).
    ``out``: a folder for metrics.jsonl, checkpoints/step-*/ and, at the end, final/; default:
    nothing is written. The same call resumes a run that was interrupted; with more steps it goes on
    where the learning rates so far stay the same (``constant``, or ``wsd`` before the decay).
    ``progress``: show the progress on stderr. ``record``: a text that describes the run, kept as
    run.yaml in ``out``.

    Ctrl-C or SIGTERM finishes and saves the current step; a second one stops at once.

    Raises TrainingDiverged if the loss, the gradient or the weights are not finite, or the loss
    stays far too high; RunMismatchError if ``out`` holds another run; FolderInUseError if another
    process trains in ``out``; CheckpointError if a checkpoint cannot be read or written, WriteError
    if the log cannot be written; SpecError if the spec is wrong; ArchdslError if the data do not
    fit the model.
    """
    if not isinstance(config, TrainConfig):
        wanted = "a TrainConfig is needed, such as archdsl.training.config.TrainConfig(steps=100)"
        raise ArchdslError(f"{wanted}; got {reprlib.repr(config)}")
    folder = None if out is None else Path(out)
    start = model if isinstance(model, Checkpoint) else None
    built = _built(model, config.seed)
    params = sum(parameter.numel() for parameter in built.parameters())
    with joined(config.device, config.parallel, params) as ranks:
        trainer = Trainer(built, data, config, start, ranks=ranks)
        with locked_by_first(folder, ranks) if folder else nullcontext():
            validation = _resume(trainer, folder) if folder else None
            resumed_from = trainer.step
            if folder and record is not None and ranks.first:
                write_text(folder / "run.yaml", record)  # only now: `out` may be another run's
            if validation is None:
                shown = progress and ranks.first
                with TrainProgress(config.steps, shown) as display, _interrupts() as stop:
                    validation = _run(trainer, Recorder(trainer, folder, display, stop))
    return TrainResult(trainer.model, trainer.step, validation, resumed_from)


@contextmanager
def locked_by_first(out: Path, ranks: Ranks) -> Iterator[None]:
    """Create the folder of a run, and keep others than ``ranks`` from it inside the block."""
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(_locked(out)))
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Create the folder of a run, and keep other processes from it inside the block."""
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be used as the folder of a run: {error}") from None
    refusal = FolderInUseError(
        f"another process is training in {out}; wait until it ends, or choose another folder"
    )
    with exclusive(out, refusal):
        remove_temporary_files(out)
        remove_leftovers(out / "checkpoints")
        yield


def _built(model: LanguageModel | Checkpoint | Source, seed: int) -> LanguageModel:
    if isinstance(model, Checkpoint):
        return model.model
    return model if isinstance(model, nn.Module) else build(model, seed=seed)


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest checkpoint in the folder of a run; None if there is none."""
    return max(_checkpoints(out), default=None, key=_step_of)


def _checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints, oldest first. One that is still being written has another name."""
    found = (out / "checkpoints").glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-[0-9]{6,18}", path.name)]
    return sorted(named, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _resume(trainer: Trainer, out: Path) -> Evaluation | None:
    """Load the state of the run in ``out``; return the validation if the run has finished.

    A run that is given more steps goes on from the newest checkpoint up to which the learning rates
    stay the same. Raises RunMismatchError if there is none.
    """
    path = trainer.ranks.on_first(lambda: _where_to_go_on(trainer, out))
    if path is None:
        return None
    state = load_training(path)
    if path == out / "final":
        return _finished(trainer, state, path)
    trainer.continue_from(path, state)
    for newer in _checkpoints(out) if trainer.ranks.first else ():
        if _step_of(newer) > _step_of(path):
            remove_folder(newer)
    return None


def _where_to_go_on(trainer: Trainer, out: Path) -> Path | None:
    """Return the checkpoint to go on from, or the final one of a finished run; None: begin anew."""
    final, saved = out / "final", _checkpoints(out)[::-1]
    state = load_training(final, tensors=False) if final.exists() else None
    if state is not None and not trainer.has_more_steps_than(state, final):
        return final
    if saved and _step_of(saved[0]) <= trainer.config.steps:
        for path in saved:
            if trainer.can_go_on_from(load_training(path, tensors=False), path):
                return path
    if state is not None:
        trainer.check_same_run(state, final)
    elif saved:
        trainer.check_same_run(load_training(saved[0], tensors=False), saved[0])
        return saved[0]
    return None


def _finished(trainer: Trainer, state: Mapping[str, Any], final: Path) -> Evaluation:
    """Load the weights of a finished run and return its validation."""
    trainer.check_same_run(state, final)
    stood = checked(FinishedState, state, final)
    if stood.step != trainer.config.steps:
        wanted = f"must be {trainer.config.steps}, the last step of the run"
        raise CheckpointError(f"{final / TRAINING}: step: {wanted}, got {stood.step}")
    trainer.load_weights(final)
    trainer.step = stood.step
    return stood.validation


def _run(trainer: Trainer, recorder: Recorder) -> Evaluation:
    try:
        trainer.run(on_step=recorder.after_step)
        return recorder.finish()
    except TrainingDiverged as error:
        recorder.give_up(error)
    finally:
        recorder.close()


class Recorder:
    """Write the log, validate, save checkpoints and show the progress after each step.

    ``stop``: if it is set, the run is saved and stopped after the current step.
    """

    def __init__(
        self, trainer: Trainer, out: Path | None, display: TrainProgress, stop: threading.Event
    ) -> None:
        self.trainer, self.out, self.display, self.stop = trainer, out, display, stop
        self.ranks = trainer.ranks
        config = trainer.config
        facts = {"spec": trainer.model.spec.name, "data": trainer.data.name} | config.model_dump()
        chosen = config.log if self.ranks.first else ()
        self.loggers = open_loggers(chosen, out, trainer.step, facts)
        writes = out is not None and self.ranks.first
        self.log = JsonLog(out / "metrics.jsonl", trainer.step) if out and writes else None
        self.loggers += [self.log] if self.log else []
        peak = config.peak_flops or peak_flops(trainer.device, trainer.in_bfloat16)
        self.throughput = Throughput(trainer.model, trainer.context, peak, self.ranks.size)
        self.profile = profile_of(trainer.model, config, out) if self.ranks.first else None
        self.tokens, self.seconds = 0, 0.0  # since the last line of the log
        self.shares: dict[str, float] = {}
        self.validation: Evaluation | None = None
        if trainer.step:
            display.resumed(trainer.step)

    def after_step(self, step: TrainStep) -> None:
        """Record a step. Raises KeyboardInterrupt, after saving, if a stop was requested."""
        config = self.trainer.config
        last = step.step == config.steps
        if self.profile is not None:
            self.profile.after_step(step.step)
        self.tokens += step.tokens
        self.seconds += step.seconds
        validate = last or _due(step, config.eval_every)
        rate = self.tokens / self.seconds
        if validate or _due(step, config.log_every):
            self._write_line(step, rate, validate)
        self.display.step(step.step, step.loss, rate, self.shares)
        if last:  # `_run` writes the final checkpoint
            if config.schedule == "constant":
                self._save()  # from which a run of more steps goes on
            return
        # Do not let the checkpoints of a diverging run replace the good ones.
        diverging = self.trainer.diverging_steps > 0
        due = _due(step, config.checkpoint_every) or step.step == self._branch
        stop = self.ranks.any(self.stop.is_set())
        if stop or (not diverging and due):
            self._save()
        if stop:
            self.trainer.wait()
            raise KeyboardInterrupt(f"stopped after step {step.step}; {self._how_to_resume()}")

    def _write_line(self, step: TrainStep, rate: float, validate: bool) -> None:
        self.shares = self.ranks.mean(self.trainer.model.router_shares())
        record: dict[str, Any] = {
            "tokens": self.trainer.tokens,
            "loss": step.loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens_per_s": round(rate, 1),
            **self.throughput.figures(rate),
            "router_shares": self.shares,
        }
        if accuracies := self.trainer.model.predictor_accuracies():
            record["predictor_accuracies"] = accuracies
        if validate:
            self.validation = self.trainer.evaluate()
            record["validation"] = self.validation.model_dump(mode="json")
            if self.trainer.config.loss_per_step:
                record["loss_of_steps"] = self.trainer.loss_of_steps()
            self.display.note(f"step {step.step}: {_described(self.validation)}")
        for logger in self.loggers:
            logger.log(step.step, record)
        self.tokens, self.seconds = 0, 0.0

    def _save(self) -> None:
        if self.out is None:
            return
        # Write the log first: a crash must not leave a checkpoint without the lines before it.
        if self.log is not None:
            self.log.lines.fsync()
        self.trainer.save(self.out / "checkpoints" / f"step-{self.trainer.step:06d}")
        for old in _checkpoints(self.out)[: -self.trainer.config.keep_last]:
            if self.ranks.first and _step_of(old) != self._branch:
                remove_folder(old)

    @property
    def _branch(self) -> int | None:
        """The step from which a run of more steps goes on with wsd: the last one before the decay.

        Its checkpoint is kept. With the schedule constant it is the last step.
        """
        config = self.trainer.config
        return config.steps_before_decay if config.schedule == "wsd" else None

    def _how_to_resume(self) -> str:
        if self.out is None:
            return "nothing was saved, as no output folder was given"
        last = last_checkpoint(self.out)
        return f"the same command resumes from {last}" if last else "no checkpoint was written yet"

    def give_up(self, error: TrainingDiverged) -> NoReturn:
        """Raise TrainingDiverged again with the path of the last good checkpoint."""
        last = last_checkpoint(self.out) if self.out else None
        rest = (
            f"the last good checkpoint is {last}"
            if last
            else "no checkpoint was written before that"
        )
        told = TrainingDiverged(f"{error}; {rest}")
        told.told_by_another = not self.ranks.first  # all processes find the same
        raise told from None

    def close(self) -> None:
        """Close the logs, end the profile, and wait for a checkpoint that is being written."""
        with ExitStack() as stack:  # all of them, also if one fails
            stack.callback(self.trainer.close)
            for logger in self.loggers:
                stack.callback(logger.close)
            if self.profile is not None:
                stack.callback(self.profile.close)

    def finish(self) -> Evaluation:
        """Write the final checkpoint and return the validation after the last step."""
        validation = self.validation or self.trainer.evaluate()
        if self.out is not None:
            self.trainer.save_final(self.out / "final", validation)
        return validation


def _due(step: TrainStep, every: int) -> bool:
    return every > 0 and step.step % every == 0


def _described(found: Evaluation) -> str:
    words = f"validation loss {found.loss:.4f}"
    if found.bits_per_byte is not None:
        words += f", {found.bits_per_byte:.3f} bits per byte"
    if found.causal is not None:
        words += f" (a router looks at later tokens; with causal routing {found.causal.loss:.4f})"
    return words


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets. A second one does what is usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can handle signals
        return
    usual = {
        signal.SIGINT: signal.getsignal(signal.SIGINT) or signal.default_int_handler,
        signal.SIGTERM: signal.getsignal(signal.SIGTERM) or signal.SIG_DFL,
    }

    def request_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    for number in usual:
        signal.signal(number, request_stop)
    try:
        yield stop
    finally:
        restore()
