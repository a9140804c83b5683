"""Evaluate one model at many settings of its compute dial: loss against executed FLOPs.

The preset holds the settings of the elastic-inference table of Chen et al. 2502.13842: capacities
of three routed steps that are changed only at test time.

Shapes: W windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track
from torch import Tensor

from archdsl.data.types import Batch, Data, HeldOut
from archdsl.evaluation.evaluate import (
    bits_per_byte,
    check_data_fits,
    evaluation_mode,
    ratio_of_sums,
    score_batch,
    scored_windows,
)
from archdsl.lang.strict import Strict
from archdsl.model.compute_meter import Meter, metered
from archdsl.model.language_model import LanguageModel
from archdsl.nn.loop import DialError

PAPER_CAPACITIES = (
    (0.9, 0.9, 0.9),
    (0.7, 0.7, 0.9),
    (0.7, 0.7, 0.7),
    (0.5, 0.5, 0.5),
    (0.9, 0.9, 0.0),
    (0.9, 0.0, 0.9),
    (0.0, 0.9, 0.9),
    (1.0, 1.0, 1.0),
)

Routing = Literal["causal", "leaking"]
LABELS: dict[Routing, str] = {
    "causal": "causal routing",
    "leaking": "routing that looks at later tokens: no decoder can do this",
}


class DialSetting(Strict):
    """A setting of the compute dial.

    ``capacity``: one capacity for all routed steps, or one for each of them, in 0 to 1.
    ``steps``: the number of steps of each loop. ``exit``: the threshold at which tokens stop
    looping. None means as trained.
    """

    capacity: float | tuple[float, ...] | None = None
    steps: int | None = None
    exit: float | None = None

    @property
    def trained(self) -> bool:
        """Whether this is the setting that the model was trained with."""
        return self == AS_TRAINED

    def __str__(self) -> str:
        """Capacities in percent as in the paper, such as ``90/90/0``; ``50@6`` has six steps; an
        exit is shown as ``exit 0.9``."""
        shares = self.capacity if isinstance(self.capacity, tuple) else (self.capacity,)
        text = "/".join(f"{100 * share:.4g}" for share in shares if share is not None)
        text += f"@{self.steps}" if self.steps else ""
        leaves = "" if self.exit is None else f"exit {self.exit:g}"
        return f"{text} {leaves}".strip() or "trained"


AS_TRAINED = DialSetting()


class SweepPoint(Strict):
    """The held-out quality at one setting of the dial, and its cost.

    ``routing``: ``causal``, or ``leaking`` for routers that look at later tokens.
    ``flops_per_token``: executed FLOPs of the forward pass.
    ``shares``: the share of the tokens that each routed step selected, by its name.
    ``tokens``: the number of target positions. ``loss``: nats per target position.
    ``standard_error``: of the loss, over windows.
    ``difference``: the loss minus the loss at the trained setting, in nats.
    ``difference_error``: its standard error, from the paired differences of the windows.
    """

    setting: DialSetting
    routing: Routing
    flops_per_token: float
    shares: dict[str, float]
    tokens: int
    loss: float
    standard_error: float | None
    bits_per_byte: float | None
    difference: float
    difference_error: float | None

    @property
    def selected(self) -> float | None:
        """Share of the tokens that a routed step selects, averaged; None without routed steps."""
        return sum(self.shares.values()) / len(self.shares) if self.shares else None


@contextmanager
def dialled(model: LanguageModel, setting: DialSetting) -> Iterator[None]:
    """Set the dial of the model for the duration of the context; reset it to trained afterwards.

    Raises DialError if the model does not support the setting.
    """
    capacity = setting.capacity
    shares = list(capacity) if isinstance(capacity, tuple) else capacity
    model.dial(shares, setting.steps, setting.exit)
    try:
        yield
    finally:
        model.dial()


def check_settings(model: LanguageModel, settings: Sequence[DialSetting]) -> None:
    """Raises DialError if the model does not support one of the settings."""
    for setting in settings:
        with dialled(model, setting):
            pass


def preset_settings(model: LanguageModel) -> list[DialSetting]:
    """Return the preset settings that the model supports.

    These are the capacities of the paper, all tokens (capacity 1) and no further steps (0). The
    paper has three routed steps: in a loop with another number of them, each step takes the
    capacity of the third of the loop in which its middle lies. If the loops of the model differ in
    their number of routed steps, only settings with one capacity for all of them remain. Without
    routers the settings are numbers of steps: the powers of two below the trained number, and twice
    that number; and, with exits, thresholds at which tokens stop.

    Raises DialError if the model has no loops.
    """
    loops = model.loops
    if not loops:
        raise DialError(f"{model.spec.name} has no loops, so its compute dial has no effect")
    routed = {loop.steps - loop.full_steps for loop in loops if loop.router is not None}
    if routed:
        shares = [_stretched(thirds, routed) for thirds in PAPER_CAPACITIES]
        found = dict.fromkeys([*filter(None, shares), DialSetting(capacity=0.0)])
    else:
        most = max(loop.steps for loop in loops)
        fewer = [2**i for i in range(most.bit_length()) if 2**i < most]
        found = dict.fromkeys(DialSetting(steps=steps) for steps in [*fewer, 2 * most])
    thresholds = {threshold for loop in loops for threshold in loop.thresholds}
    found |= dict.fromkeys(DialSetting(exit=threshold) for threshold in sorted(thresholds))
    return [setting for setting in found if _supports(model, setting)]


def _stretched(thirds: tuple[float, ...], routed: set[int]) -> DialSetting | None:
    """Adapt the capacities of three routed steps to another number; None if it is not unique."""
    if len(set(thirds)) == 1:
        return DialSetting(capacity=thirds[0])
    if len(routed) != 1:
        return None
    steps = routed.copy().pop()
    shares = tuple(thirds[(2 * step + 1) * len(thirds) // (2 * steps)] for step in range(steps))
    return DialSetting(capacity=shares[0] if len(set(shares)) == 1 else shares)


def _supports(model: LanguageModel, setting: DialSetting) -> bool:
    try:
        check_settings(model, [setting])
    except DialError:
        return False
    return True


def sweep(
    model: LanguageModel,
    data: Data,
    settings: Sequence[DialSetting] | None = None,
    *,
    split: HeldOut = "validation",
    batch_size: int = 16,
    context: int | None = None,
    limit_tokens: int | None = None,
    progress: bool = False,
) -> list[SweepPoint]:
    """Measure the held-out loss at the trained setting and at each of ``settings``.

    ``settings``: default: ``preset_settings(model)``. ``batch_size``: windows per forward pass.
    ``context``: tokens per window; default: the spec's. ``limit_tokens``: the largest number of
    tokens to read; default: all. ``progress``: show a progress bar on stderr.

    A model whose router looks at later tokens is measured with causal routing and as trained.
    Raises DialError, before any computation, if the model does not support a setting, and
    ArchdslError if the data do not fit the model or the split has no target positions.
    """
    settings = preset_settings(model) if settings is None else settings
    context = context or model.spec.context
    check_data_fits(model.spec, data, context)
    check_settings(model, settings)
    ways: list[Routing] = ["causal", "leaking"] if model.leaks else ["causal"]
    todo = [(routing, setting) for routing in ways for setting in (AS_TRAINED, *settings)]
    points: list[SweepPoint] = []
    trained: dict[Routing, Tensor] = {}
    for routing, setting in track(
        todo, "sweep", console=Console(stderr=True), disable=not progress
    ):
        batches = data.held_out(split, batch_size, context, limit_tokens)
        with _routed(model, routing), dialled(model, setting):
            scores, meter = _scored(model, batches)
        score_3W = scored_windows(scores, data, split)
        base_3W = trained.setdefault(routing, score_3W)
        points.append(
            SweepPoint(
                setting=setting,
                routing=routing,
                flops_per_token=meter.flops_per_token,
                shares=meter.shares,
                **_figures(score_3W, base_3W, data.bytes_per_token(split)),
            )
        )
    return points


def _routed(model: LanguageModel, routing: Routing) -> AbstractContextManager[None]:
    return model.causal_routing() if routing == "causal" else nullcontext()


def _scored(model: LanguageModel, batches: Iterable[Batch]) -> tuple[list[Tensor], Meter]:
    with evaluation_mode(model), metered(model) as meter:
        return [score_batch(model, batch) for batch in batches], meter


def _figures(score_3W: Tensor, trained_3W: Tensor, bytes_per_token: float | None) -> dict[str, Any]:
    loss_W, targets_W, _ = score_3W
    loss, error = ratio_of_sums(loss_W, targets_W)
    difference, difference_error = ratio_of_sums(loss_W - trained_3W[0], targets_W)
    return {
        "tokens": int(targets_W.sum()),
        "loss": loss,
        "standard_error": error,
        "bits_per_byte": bits_per_byte(loss, bytes_per_token),
        "difference": difference,
        "difference_error": difference_error,
    }


def plot(points: Sequence[SweepPoint], path: Path) -> None:
    """Write a PNG of loss against executed FLOPs per token, with one curve for each routing.

    The error bars are 95% confidence intervals of the difference to the trained setting. Intervals
    of the loss itself would mostly show how much the texts differ. Raises ImportError if matplotlib
    is missing (the extra ``plots``).
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for routing in dict.fromkeys(point.routing for point in points):
        curve = [point for point in points if point.routing == routing]
        _draw(axis, sorted(curve, key=lambda point: point.flops_per_token), routing)
    axis.set(
        xlabel="executed MFLOPs per token (forward pass)",
        ylabel="held-out loss (nats per token)",
    )
    axis.set_title("error bars: 95% intervals of the difference to the trained setting", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
    temporary.replace(path)


def _draw(axis: Any, curve: Sequence[SweepPoint], routing: Routing) -> None:
    flops = [point.flops_per_token / 1e6 for point in curve]
    losses = [point.loss for point in curve]
    axis.errorbar(
        flops,
        losses,
        yerr=[1.96 * (point.difference_error or 0.0) for point in curve],
        fmt="o-" if routing == "causal" else "s--",
        markersize=4,
        linewidth=0.8,
        capsize=3,
        label=LABELS[routing],
    )
    if routing == "causal":
        for place, point in zip(zip(flops, losses, strict=True), curve, strict=True):
            axis.annotate(str(point.setting), place, (3, 5), textcoords="offset points", fontsize=7)
