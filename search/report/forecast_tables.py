"""A forecast on the screen, in words that tell what was counted from what is estimated."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.text import Text

from archdsl.lang.budget import LIMITS
from archdsl.reports.tables import TwoColumns, quantity, short
from archdsl.search.analysis.forecast import Plan, Spread
from archdsl.search.analysis.timing import MANY

STOPS = {
    "models": "every model of the space",
    "trials": "the trials asked for",
    "time": "the time given",
    "train_flops": "the training FLOPs given",
    "": "nothing: give --time, --trials or --train-flops",
}


UNITS = [("s", 1, 100), ("min", 60, 6000), ("h", 3600, float("inf"))]  # up to so many seconds


def shown(plan: Plan) -> RenderableType:
    """What --plan prints."""
    head = (
        "Nothing was trained that a search would use. The space and the budget are counted; all "
        f"else is estimated from {len(plan.calibration.models)} proxies, each trained for at most "
        f"{MANY} steps, in {plan.calibration.seconds:.0f} s."
    )
    facts = [
        ("space", _space(plan)),
        *(("budget", line) for line in _kept(plan)),
        ("trial", _trial(plan)),
        ("memory", _memory(plan)),
        ("search", _search(plan)),
        ("after it", _after(plan)),
        ("end", _end(plan)),
        ("training", f"{_between(plan, 'train_flops', short)} FLOPs, controls included"),
        *(("failed", failure) for failure in plan.calibration.failures),
    ]
    return Group(Text(head, "bold"), "", TwoColumns(facts))


def _space(plan: Plan) -> str:
    found = plan.survey
    size = "continuous" if found.size is None else f"{found.size:,} points"
    conflicts = f"; of {found.invalid} the choices do not go together" if found.invalid else ""
    models = f"; {found.distinct:,} different models"
    if plan.interval is None:
        return f"{size}, {found.feasible:,} of which keep to the budget{conflicts}{models}"
    low, high = plan.interval
    return (
        f"{size}; of {found.tried:,} drawn at random {found.feasible:,} keep to the budget "
        f"({low:.1%} to {high:.1%} of all draws, 95%){conflicts}{models}"
    )


def _kept(plan: Plan) -> list[str]:
    return [
        f"{least:,.0f} to {most:,.0f} of {limit:,} {LIMITS[name].unit}"
        for name, (limit, least, most) in plan.kept.items()
    ]


def _trial(plan: Plan) -> str:
    first = "" if plan.trial == plan.stopped else f"; {_seconds(plan.stopped.seconds)} if stopped "
    return (
        f"{_seconds(plan.trial.seconds)} of one worker up to the last rung"
        f"{first and first + 'on the first'}"
    )


def _seconds(spread: Spread) -> str:
    return f"{_time(spread.mean)} ({_time(spread.least)} to {_time(spread.most)})"


def _memory(plan: Plan) -> str:
    workers = plan.means.workers
    whole = f", {quantity(workers * plan.peak_bytes, 'B')} for all {workers}" if workers > 1 else ""
    return f"{quantity(plan.peak_bytes, 'B')} for a worker at most{whole}"


def _search(plan: Plan) -> str:
    if plan.climbing.trials < 1:
        flops = plan.trial.flops.mean * (1 + plan.after)
        return (
            "no trial and all that follows it fit into the means; that needs "
            f"{_time(_least_time(plan))} and {short(flops)} training FLOPs"
        )
    if plan.climbing.stops_at == "":
        return f"ended by {STOPS['']}"
    few, many = plan.climbing.trials, plan.stopping.trials
    count = f"{few:,.0f}" if few == many else f"{few:,.0f} to {many:,.0f}"
    how = "" if few == many else ", from all climbing to the last rung to all stopped on the first"
    return f"{count} trials{how}; ended by {STOPS[plan.climbing.stops_at]}"


def _least_time(plan: Plan) -> float:
    return plan.trial.seconds.mean * (1 + plan.after) / plan.means.workers


def _after(plan: Plan) -> str:
    whole = plan.climbing.seconds
    share = f", {plan.seconds_after / whole:.0%} of the whole" if whole < float("inf") else ""
    return (
        f"{plan.after:.0f} trainings of the winner, its controls and ablations, and of wider "
        f"proxies: {_time(plan.seconds_after)}{share}"
    )


def _end(plan: Plan) -> str:
    workers = plan.means.workers
    if plan.climbing.stops_at == "time" and plan.climbing.trials < 1 and plan.means.seconds:
        return f"after {_time(plan.means.seconds)}, with controls left undone"
    return f"after {_between(plan, 'seconds', _time)} with {workers} worker{'s'[: workers - 1]}"


def _between(plan: Plan, what: str, words: Callable[[float], str]) -> str:
    ends = sorted({getattr(plan.climbing, what), getattr(plan.stopping, what)})
    if ends[-1] == float("inf"):
        return "no end: unlimited"
    return " to ".join(dict.fromkeys(map(words, ends)))


def _time(seconds: float) -> str:
    """``7.1 s``, ``2.5 min``, ``12 min``, ``3.5 h``."""
    unit, size = next((u, s) for u, s, most in UNITS if seconds < most)
    amount = seconds / size
    return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
