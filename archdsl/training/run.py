"""Training as a run in a folder: model, data and config in; trained model, log, checkpoints out."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from archdsl.data.types import Data
from archdsl.evaluation.evaluate import Evaluation
from archdsl.files import JsonLines, remove_folder, remove_leftovers
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import build
from archdsl.model.checkpoint import Checkpoint, CheckpointError, load_training, load_weights
from archdsl.model.language_model import LanguageModel
from archdsl.training.config import TrainConfig
from archdsl.training.progress import TrainProgress
from archdsl.training.trainer import RunMismatchError, Trainer, TrainingDiverged, TrainStep

__all__ = [
    "RunMismatchError",
    "TrainConfig",
    "TrainResult",
    "TrainStep",
    "Trainer",
    "TrainingDiverged",
    "last_checkpoint",
    "train",
]


@dataclass(frozen=True)
class TrainResult:
    """``resumed_from`` is the step where this call took over, 0 for a run made in one go."""

    model: LanguageModel
    steps: int
    validation: Evaluation
    resumed_from: int


def train(
    model: LanguageModel | ModelSpec | Checkpoint,
    data: Data,
    config: TrainConfig,
    out: Path | None = None,
    progress: bool = False,
) -> TrainResult:
    """Trains to the last step of the config and validates.

    The weights of a checkpoint are where a new run starts. Fills ``out`` with metrics.jsonl,
    checkpoints/step-*/ and, at the end, final/. The same call goes on after a crash. Ctrl-C
    finishes and saves the step first, a second one does not. Raises TrainingDiverged,
    RunMismatchError or CheckpointError.
    """
    start = model if isinstance(model, Checkpoint) else None
    trainer = Trainer(_built(model, config.seed), data, config, start)
    validation = _resume(trainer, out) if out else None
    resumed_from = trainer.step
    if validation is None:
        with TrainProgress(config.steps, progress) as display, _interrupts() as asked:
            validation = _run(trainer, Recorder(trainer, out, display, asked))
    return TrainResult(trainer.model, trainer.step, validation, resumed_from)


def _built(model: LanguageModel | ModelSpec | Checkpoint, seed: int) -> LanguageModel:
    if isinstance(model, Checkpoint):
        return model.model
    return build(model, seed=seed) if isinstance(model, ModelSpec) else model


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run's folder from which training goes on."""
    return max(_checkpoints(out), default=None, key=_step_of)


def _checkpoints(out: Path) -> list[Path]:
    """Oldest first; what is still being written has another name."""
    found = (out / "checkpoints").glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-[0-9]{6,18}", path.name)]
    return sorted(named, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _resume(trainer: Trainer, out: Path) -> Evaluation | None:
    """Takes over what the folder holds; the validation of a finished run, None otherwise."""
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot hold a run: {error}") from None
    remove_leftovers(out / "checkpoints")
    final, last = out / "final", last_checkpoint(out)
    if final.exists():
        state = load_training(final)
        trainer.check_same_run(state, final)
        load_weights(final, trainer.model)
        trainer.step = int(state["step"])
        return Evaluation.model_validate(state["validation"])
    if last is not None:
        trainer.load(last)
    return None


def _run(trainer: Trainer, recorder: Recorder) -> Evaluation:
    try:
        trainer.run(on_step=recorder.after_step)
        return recorder.finish()
    except TrainingDiverged as error:
        recorder.give_up(error)
    finally:
        recorder.close()


class Recorder:
    """What happens between the steps: the log, validations, checkpoints, the display."""

    def __init__(
        self, trainer: Trainer, out: Path | None, display: TrainProgress, asked: threading.Event
    ) -> None:
        self.trainer, self.out, self.display, self.asked = trainer, out, display, asked
        self.log = JsonLines(out / "metrics.jsonl", trainer.step) if out else None
        self.tokens, self.seconds = 0, 0.0  # since the last line of the log
        self.shares: dict[str, float] = {}
        self.validation: Evaluation | None = None
        if trainer.step:
            display.resumed(trainer.step)

    def after_step(self, step: TrainStep) -> None:
        config = self.trainer.config
        last = step.step == config.steps
        self.tokens += step.tokens
        self.seconds += step.seconds
        validate = last or _due(step, config.eval_every)
        rate = self.tokens / self.seconds
        if validate or _due(step, config.log_every):
            self._write_line(step, rate, validate)
        self.display.step(step.step, step.loss, rate, self.shares)
        if last:
            return  # _run writes the final checkpoint
        # a loss that has gone mad must not push the good checkpoints out
        sane = not self.trainer.absurd_steps
        if self.asked.is_set() or (sane and _due(step, config.checkpoint_every)):
            self._save()
        if self.asked.is_set():
            raise KeyboardInterrupt(f"stopped after step {step.step}; {self._way_on()}")

    def _write_line(self, step: TrainStep, rate: float, validate: bool) -> None:
        self.shares = self.trainer.model.router_shares()
        record = {
            "step": step.step,
            "tokens": self.trainer.tokens,
            "loss": step.loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens_per_s": round(rate, 1),
            "router_shares": self.shares,
        }
        if accuracies := self.trainer.model.predictor_accuracies():
            record["predictor_accuracies"] = accuracies
        if validate:
            self.validation = self.trainer.evaluate()
            record["validation"] = self.validation.model_dump(mode="json")
            self.display.note(f"step {step.step}: {_in_words(self.validation)}")
        if self.log is not None:
            self.log.append(record)
        self.tokens, self.seconds = 0, 0.0

    def _save(self) -> None:
        if self.out is None or self.log is None:
            return
        self.log.fsync()  # or a crash could leave a checkpoint without the lines before it
        self.trainer.save(self.out / "checkpoints" / f"step-{self.trainer.step:06d}")
        for old in _checkpoints(self.out)[: -self.trainer.config.keep_last]:
            remove_folder(old)

    def _way_on(self) -> str:
        if self.out is None:
            return "nothing was saved, as no folder was given"
        last = last_checkpoint(self.out)
        return f"the same command goes on from {last}" if last else "no checkpoint was due yet"

    def give_up(self, error: TrainingDiverged) -> NoReturn:
        last = last_checkpoint(self.out) if self.out else None
        rest = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        raise TrainingDiverged(f"{error}; {rest}") from None

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def finish(self) -> Evaluation:
        """Writes the final checkpoint; training must have reached the last step."""
        validation = self.validation or self.trainer.evaluate()
        if self.out is not None:
            self.trainer.save_final(self.out / "final", validation)
        return validation


def _due(step: TrainStep, every: int) -> bool:
    return every > 0 and step.step % every == 0


def _in_words(found: Evaluation) -> str:
    words = f"validation loss {found.loss:.4f}"
    if found.bits_per_byte is not None:
        words += f", {found.bits_per_byte:.3f} bits per byte"
    if found.causal is not None:
        words += f" (a router sees the future; causally {found.causal.loss:.4f})"
    return words


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second interrupts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals belong to the main thread
        return
    usual = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)
