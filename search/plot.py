"""The picture of a search: proxy loss against what the full-size model costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from archdsl.cost import cost
from archdsl.search.compare import spread
from archdsl.search.report import WINNER, describe

if TYPE_CHECKING:
    from archdsl.search.report import Report


def plot(report: Report, path: Path) -> None:
    """One panel for each task: trials, winner and controls with the range over seeds. A PNG.

    Raises ImportError without matplotlib (the extra ``plots``).
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(report.tasks), figsize=(5.5 * len(report.tasks), 4.5), squeeze=False
    )
    trials = [(cost(trial.spec).expected / 1e6, trial) for trial in report.best]
    for axis, task in zip(axes[0], report.tasks, strict=True):
        axis.scatter(
            [flops for flops, _ in trials],
            [trial.rungs[-1][task].loss for _, trial in trials],
            color="0.6",
            label="trials, one seed",
        )
        for i, entry in enumerate(report.entries):
            middle, half = spread(entry.losses(task))
            axis.errorbar(
                entry.receipt.expected / 1e6,
                middle,
                yerr=half,
                fmt="*" if entry.name == WINNER else "s",
                markersize=13 if entry.name == WINNER else 7,
                capsize=4,
                color=f"C{i}",
                label=entry.name,
            )
        axis.set(
            title=task,
            xlabel="full-size forward MFLOPs per token",
            ylabel="proxy validation loss, nats",
        )
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Bars: range over seeds. {describe(report.proxy)}", fontsize=7, wrap=True)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
    temporary.replace(path)
