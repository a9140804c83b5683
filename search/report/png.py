"""The plots of a search as PNG files, drawn from the content of result.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from archdsl.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# colours of Okabe and Ito (2008), which colour-blind readers can distinguish
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c3cad2"
MARKS = {"winner": ("*", 15, ORANGE), "baseline": ("s", 7, GREEN), "ablation": ("D", 6, PINK)}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "legend.frameon": False,
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name starts no formula
}
ResultJson = dict[str, Any]


def plot(result: ResultJson, folder: Path) -> list[Path]:
    """Draw front.png, curves.png, importance.png, spent.png and health.png and return their paths.

    Plots without any data are left out. Raises ImportError if matplotlib (the extra ``plots``) is
    not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    pictures: dict[str, Callable[[ResultJson, Figure], None]] = {
        "front.png": _front,
        "curves.png": _curves,
        "importance.png": _importance,
        "spent.png": _spent,
        "health.png": _health,
    }
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, draw in pictures.items():
            figure = Figure(figsize=(8, 5), layout="constrained")
            draw(result, figure)
            if figure.axes:
                drawn.append(save(figure, folder / name))
    return drawn


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG in one step, so that no reader sees half a file."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return path


def _weights(result: ResultJson) -> dict[str, float]:
    tasks = result["settings"]["proxy"]["tasks"]
    return {name: float(task["weight"]) for name, task in tasks.items()}


def _objective(rung: dict[str, Any], weights: dict[str, float]) -> float | None:
    losses = {task: rung[task]["loss"] for task in weights}
    if None in losses.values():
        return None
    return sum(weight * float(losses[task]) for task, weight in weights.items())


def _ranked(result: ResultJson) -> list[dict[str, Any]]:
    """Return the trials that reached the last rung, of lowest loss first."""
    done = [trial for trial in result["trials"] if trial["values"]]
    return sorted(done, key=lambda trial: float(trial["values"]["loss"]))


def _flops(one: dict[str, Any], result: ResultJson) -> float:
    """Return the MFLOPs per token of a trial or entry: executed if they were an objective."""
    nominal = float(one["flops_per_token"])
    if "flops" not in result["axes"]:
        return nominal / 1e6
    measured = (one.get("values") or {}).get("flops", one.get("executed_flops_per_token"))
    return (nominal if measured is None else float(measured)) / 1e6


def _front(result: ResultJson, figure: Figure) -> None:
    """Draw the trials, the Pareto front, and the winner and its baselines with their range."""
    ranked = _ranked(result)
    if not ranked:
        return
    axes = figure.add_subplot()
    axes.plot(*_columns(_stopped(result)), ".", color=GREY, label="stopped early")
    done = [(_flops(trial, result), trial["values"]["loss"]) for trial in ranked]
    axes.plot(*_columns(done), "o", color=BLUE, markersize=5, label="trial")
    best = sorted(
        (_flops(trial, result), trial["values"]["loss"])
        for trial in ranked
        if trial["trial"] in result["front"]
    )
    line = "-" if len(result["axes"]) <= 2 else ""  # with three axes the front is not a line
    (drawn,) = axes.step(*_columns(best), where="post", color=BLUE, label="front", linestyle=line)
    drawn.set(marker="o", markerfacecolor="none", markersize=9)
    places = _places([_flops(entry, result) for entry in result["entries"]])
    placed = list(zip(places, result["entries"], strict=True))
    for role in ("ablation", "baseline", "winner"):
        _draw_entries([(x, entry) for x, entry in placed if _role(entry) == role], role, axes)
    _label_baselines(placed, axes)
    _limit(axes, [loss for _, loss in done], result)
    which = "executed" if "flops" in result["axes"] else "nominal"
    axes.set(
        xlabel=f"{which} MFLOPs per token, full size",
        ylabel=f"held-out loss of the proxy, nats: {result['objective']}",
        title="Bars span the seeds; models of equal FLOPs are drawn side by side",
    )
    axes.legend()


def _stopped(result: ResultJson) -> list[tuple[float, float]]:
    """Return FLOPs and loss of the trials that were stopped early."""
    weights = _weights(result)
    return [
        (_flops(trial, result), loss)
        for trial in result["trials"]
        if trial["outcome"] == "pruned"
        and trial["rungs"]
        and (loss := _objective(trial["rungs"][-1], weights)) is not None
    ]


def _role(entry: dict[str, Any]) -> str:
    """Return the role of an entry; earlier versions wrote "control" for "baseline"."""
    return "baseline" if entry["role"] == "control" else str(entry["role"])


def _places(flops: list[float]) -> list[float]:
    """Move equal values side by side, because their bars would hide one another."""
    before = [sum(abs(x - y) < 0.01 * x for y in flops[:i]) for i, x in enumerate(flops)]
    return [x * (1 + 0.012 * count) for x, count in zip(flops, before, strict=True)]


def _draw_entries(placed: list[tuple[float, dict[str, Any]]], role: str, axes: Axes) -> None:
    known = [(x, [y for y in entry["objective"] if y is not None]) for x, entry in placed]
    points = [
        (x, middle, middle - min(losses), max(losses) - middle)
        for x, losses in known
        if losses
        for middle in [fmean(losses)]
    ]
    if not points:
        return
    flops, middles, below, above = _columns(points)
    mark, size, colour = MARKS[role]
    label = role if role == "winner" else f"{role}s"
    axes.errorbar(
        flops, middles, yerr=(below, above), fmt=mark, markersize=size, color=colour, label=label
    )


def _label_baselines(placed: list[tuple[float, dict[str, Any]]], axes: Axes) -> None:
    """Write the name of each baseline beside its mark, on the side with more room."""
    from matplotlib.patheffects import withStroke

    left, right = axes.get_xlim()
    for x, entry in placed:
        losses = [loss for loss in entry["objective"] if loss is not None]
        if _role(entry) == "baseline" and losses:
            on_left = x > (left + right) / 2
            axes.annotate(
                entry["name"],
                (x, fmean(losses)),
                xytext=(-6 if on_left else 6, -4),
                textcoords="offset points",
                ha="right" if on_left else "left",
                va="top",
                fontsize=8,
                color=GREEN,
                path_effects=[withStroke(linewidth=3, foreground="white")],
                zorder=5,
            )


def _limit(axes: Axes, losses: list[float], result: ResultJson) -> None:
    """Leave out the far-away losses of trials that were stopped after a few steps."""
    compared = [x for entry in result["entries"] for x in entry["objective"] if x is not None]
    low, high = min(losses + compared), max(losses + compared)
    room = max(high - low, 1e-3)
    axes.set_ylim(low - 0.1 * room, min(axes.get_ylim()[1], high + 0.8 * room))


def _columns(rows: list[Any]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)] or [[], []]


def _curves(result: ResultJson, figure: Figure) -> None:
    """Draw for each task the training loss as a line, and held-out losses as dots."""
    import matplotlib

    ranked, tasks = _ranked(result), _weights(result)
    shades = matplotlib.colormaps["viridis"]
    rank = {trial["trial"]: i / max(1, len(ranked) - 1) for i, trial in enumerate(ranked)}
    trained = [trial for trial in result["trials"] if trial["rungs"]]
    if not trained:
        return
    figure.set_size_inches(5.5 * len(tasks), 4.5)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for trial in sorted(trained, key=lambda trial: rank.get(trial["trial"], 2), reverse=True):
            at = rank.get(trial["trial"])
            colour = GREY if at is None else shades(0.9 * at)
            scores = [rung[task] for rung in trial["rungs"]]
            axes.plot(*_columns(scores[-1]["curve"]), color=colour, linewidth=0.7)
            dots = [(score["steps"], score["loss"]) for score in scores if score["loss"]]
            axes.plot(*_columns(dots), ".", color=colour)
        axes.set(title=task, xlabel="steps trained", ylabel="loss, nats")
    figure.suptitle("Training loss (lines) and held-out loss (dots); dark: best, grey: stopped")


def _importance(result: ResultJson, figure: Figure) -> None:
    if not result["importance"]:
        return
    bars = sorted(result["importance"].items(), key=lambda pair: float(pair[1]))
    figure.set_size_inches(8, 1.2 + 0.3 * len(bars))
    axes = figure.add_subplot()
    axes.barh([name for name, _ in bars], [100 * share for _, share in bars], color=BLUE)
    axes.set(xlabel="% of the difference between trials", title="Importance of each choice")
    axes.grid(axis="y", visible=False)


def _spent(result: ResultJson, figure: Figure) -> None:
    phases = result["spent"]["by_phase"]
    if not phases:
        return
    figure.set_size_inches(9, 1.5 + 0.4 * len(phases))
    for axes, (key, words) in zip(
        figure.subplots(1, 2, sharey=True),
        {"seconds": "seconds of all workers", "train_flops": "training FLOPs"}.items(),
        strict=True,
    ):
        axes.barh(list(phases), [phase[key] for phase in phases.values()], color=BLUE)
        axes.set(xlabel=words)
        axes.grid(axis="y", visible=False)
    figure.axes[0].invert_yaxis()


def _health(result: ResultJson, figure: Figure) -> None:
    """Draw share selected and entropy of the winner's routers, as means over tasks and seeds."""
    own = next((entry for entry in result["entries"] if entry["role"] == "winner"), None)
    scores = [score for by_seed in (own or {"scores": {}})["scores"].values() for score in by_seed]
    names = list(dict.fromkeys(name for score in scores for name in score["shares"]))
    if not names:
        return
    figure.set_size_inches(8, 1.5 + 0.3 * len(names))
    for axes, (key, words) in zip(
        figure.subplots(1, 2, sharey=True),
        {"shares": "share of tokens selected", "entropies": "entropy of the choice, bits"}.items(),
        strict=True,
    ):
        means = [_mean([score[key].get(name) for score in scores]) for name in names]
        axes.barh(names, means, color=BLUE)
        axes.set(xlabel=words, xlim=(0, 1))
        axes.grid(axis="y", visible=False)
    figure.axes[0].set_ylabel("loop.routed step")
    figure.axes[0].invert_yaxis()


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else 0.0
