"""One checkpoint at many settings of its compute dial: loss against executed FLOPs.

The preset holds the settings of Chen et al. 2502.13842's table of elastic inference: capacities of
three routed steps, changed at test time only.

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

from archdsl.blocks.dial import DialError
from archdsl.data.types import Batch, Data, HeldOut
from archdsl.evaluation.evaluate import (
    bits_per_byte,
    check_data_fits,
    evaluation_mode,
    ratio_of_sums,
    score_batch,
    scored_windows,
)
from archdsl.lang.spec import Strict
from archdsl.model.compute_meter import Meter, metered
from archdsl.model.language_model import LanguageModel

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
    "leaking": "with sight of later tokens: no decoder can do this",
}


class DialSetting(Strict):
    """Where the dial stands: a capacity for all routed steps or one for each, a number of steps.

    None: as trained.
    """

    capacity: float | tuple[float, ...] | None = None
    steps: int | None = None

    @property
    def trained(self) -> bool:
        return self == AS_TRAINED

    def __str__(self) -> str:
        """``90/90/0``, ``50@6`` for six steps: capacities in percent, as in the paper."""
        shares = self.capacity if isinstance(self.capacity, tuple) else (self.capacity,)
        text = "/".join(f"{100 * share:.4g}" for share in shares if share is not None)
        return text + (f"@{self.steps}" if self.steps else "") or "trained"


AS_TRAINED = DialSetting()


class SweepPoint(Strict):
    """Held-out quality at one setting and what it took.

    ``flops_per_token``: executed, forward. ``shares``: of the tokens that each routed step
    selected, by loop and step. ``difference``: of the loss to the trained setting's in nats,
    whose error is that of pairs of windows.
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
        """Mean share of the tokens over routed steps; None without any."""
        return sum(self.shares.values()) / len(self.shares) if self.shares else None


@contextmanager
def dialled(model: LanguageModel, setting: DialSetting) -> Iterator[None]:
    """Meanwhile the model's dial stands there, afterwards as trained. Raises DialError."""
    capacity = setting.capacity
    model.dial(list(capacity) if isinstance(capacity, tuple) else capacity, setting.steps)
    try:
        yield
    finally:
        model.dial()


def check_settings(model: LanguageModel, settings: Sequence[DialSetting]) -> None:
    """Raises DialError if the model cannot be run at one of them."""
    for setting in settings:
        with dialled(model, setting):
            pass


def preset_settings(model: LanguageModel) -> list[DialSetting]:
    """The paper's settings, each token, and no thinking, as far as the model can be run so.

    With more or fewer than three routed steps, each takes the capacity of the third of the way
    that its middle falls into; where loops differ in their number, equal capacities are left.
    Without routers: powers of two of steps below the trained number, and twice that.
    """
    loops = model.loops
    if not loops:
        raise DialError(f"{model.spec.name} has no loops: there is nothing to dial")
    routed = {loop.spec.steps - loop.spec.full_steps for loop in loops if loop.router is not None}
    if routed:
        shares = [_stretched(thirds, routed) for thirds in PAPER_CAPACITIES]
        found = dict.fromkeys([*filter(None, shares), DialSetting(capacity=0.0)])
    else:
        most = max(loop.spec.steps for loop in loops)
        fewer = [2**i for i in range(most.bit_length()) if 2**i < most]
        found = dict.fromkeys(DialSetting(steps=steps) for steps in [*fewer, 2 * most])
    return [setting for setting in found if _servable(model, setting)]


def _stretched(thirds: tuple[float, ...], routed: set[int]) -> DialSetting | None:
    """A triple of capacities for another number of routed steps."""
    if len(set(thirds)) == 1:
        return DialSetting(capacity=thirds[0])
    if len(routed) != 1:
        return None
    steps = routed.copy().pop()
    shares = tuple(thirds[(2 * step + 1) * len(thirds) // (2 * steps)] for step in range(steps))
    return DialSetting(capacity=shares[0] if len(set(shares)) == 1 else shares)


def _servable(model: LanguageModel, setting: DialSetting) -> bool:
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
    """Scores the held-out windows of ``split`` at the trained setting and ``settings``.

    ``settings``: default: ``preset_settings(model)``. A leaking model is scored causally and
    as trained.
    Raises DialError before any work, and ArchdslError if the split asks nothing.
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
    loss_W, asked_W, _ = score_3W
    loss, error = ratio_of_sums(loss_W, asked_W)
    difference, difference_error = ratio_of_sums(loss_W - trained_3W[0], asked_W)
    return {
        "tokens": int(asked_W.sum()),
        "loss": loss,
        "standard_error": error,
        "bits_per_byte": bits_per_byte(loss, bytes_per_token),
        "difference": difference,
        "difference_error": difference_error,
    }


def plot(points: Sequence[SweepPoint], path: Path) -> None:
    """Loss against executed FLOPs per token, a curve for each routing. A PNG.

    The bars are 95% intervals of the difference to the trained setting: those of the losses
    themselves say how much texts differ. Raises ImportError without matplotlib (``plots``).
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for routing in dict.fromkeys(point.routing for point in points):
        curve = [point for point in points if point.routing == routing]
        _draw(axis, sorted(curve, key=lambda point: point.flops_per_token), routing)
    axis.set(
        xlabel="executed forward MFLOPs per token",
        ylabel="held-out loss, nats per token",
    )
    axis.set_title("bars: 95% of the difference to the trained setting", fontsize=8)
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
