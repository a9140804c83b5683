"""A profile of some steps of a training: a trace with a span for each layer and each loop step.

The spans are hooks on modules, which exist only while the profiler runs, so that a training without
a profile has none. A layer that is compiled is one graph in which no hook can run. Where layers are
compiled, the trace therefore has no spans of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from archdsl.errors import ArchdslError, blamed_on
from archdsl.files import WriteError, make_folder, writing
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context
from archdsl.training.config import TrainConfig

WARM_UP = 2  # steps before those that are recorded


class Profile:
    """Records ``steps`` steps of a training, after some to warm up, as a Chrome trace in a folder.

    ``chrome://tracing`` and ui.perfetto.dev show the file ``trace-step-N.json``, where N is the
    first step that it records.
    """

    def __init__(self, model: LanguageModel, steps: int, folder: Path, spans: bool = True) -> None:
        self.model, self.steps, self.folder, self.spans = model, steps, folder, spans
        self.seen = 0
        self.running: ExitStack | None = None

    def after_step(self, step: int) -> None:
        """Begin or end the recording, if it is time, after the step of that number.

        Raises WriteError if the trace cannot be written.
        """
        self.seen += 1
        if self.seen == WARM_UP:
            self._begin(step + 1)
        elif self.seen == WARM_UP + self.steps:
            self.close()

    def _begin(self, first_step: int) -> None:
        # the profiler's own messages, which would stand between those of the training
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities)
        path = self.folder / f"trace-step-{first_step:06d}.json"

        def write() -> None:
            make_folder(self.folder)
            with writing(path):
                profiler.export_chrome_trace(str(path))
            if not path.exists():  # the profiler raises no error, and leaves half a file
                for half in self.folder.glob(f"{path.name}*"):
                    half.unlink()
                raise WriteError(f"{path} could not be written: the disk may be full")

        with ExitStack() as stack:
            stack.callback(write)
            stack.enter_context(profiler)
            if self.spans:
                stack.callback(_remove, add_spans(self.model))
            self.running = stack.pop_all()

    def close(self) -> None:
        """End the recording, if it runs, and write the trace."""
        if self.running is not None:
            running, self.running = self.running, None
            running.close()


def profile_of(model: LanguageModel, config: TrainConfig, out: Path | None) -> Profile | None:
    """Return the profile that a config asks for; None if it asks for none.

    Raises ArchdslError if there is no folder for it.
    """
    if not config.profile:
        return None
    if out is None:
        with blamed_on("profile"):
            raise ArchdslError("profile: needs the folder of the run: give out")
    return Profile(model, config.profile, out / "profile", spans=not config.compile)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def add_spans(model: LanguageModel) -> list[Any]:
    """Add a span around each layer and each step of a loop; return the handles that remove them."""
    handles: list[Any] = []
    for number, layer in enumerate(model.layers):
        handles += _spans(layer, partial(_name_of_layer, number))
    for loop in model.loops:
        for body in loop.bodies:
            handles += _spans(body, partial(_name_of_step, loop.label))
    return handles


def _name_of_layer(number: int, ctx: Context) -> str:
    return f"layer {number}"


def _name_of_step(loop: str, ctx: Context) -> str:
    return f"{loop} step {ctx.path[-1]}"  # the path ends with the number of the pass


def _spans(module: nn.Module, name: Callable[[Context], str]) -> list[Any]:
    """Add a span around the forward pass of a module; ``name`` makes its name of the context."""
    open_spans: list[record_function] = []

    def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        span = record_function(name(arguments[1]))
        span.__enter__()
        open_spans.append(span)

    def end(*_: Any) -> None:
        open_spans.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, always_call=True),
    ]
