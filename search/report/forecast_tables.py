"""A forecast on the screen, in words that tell what was counted from what is estimated."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.text import Text

from archdsl.lang.budget import LIMITS
from archdsl.reports.tables import TwoColumns, quantity, short
from archdsl.search.analysis.forecast import SearchForecast, Spread
from archdsl.search.analysis.timing import MANY

STOPS = {
    "models": "every model of the space",
    "trials": "the trials asked for",
    "time": "the time given",
    "train_flops": "the training FLOPs given",
    "": "nothing: give --time, --trials or --train-flops",
}


UNITS = [("s", 1, 100), ("min", 60, 6000), ("h", 3600, float("inf"))]  # up to so many seconds


def shown(forecast: SearchForecast) -> RenderableType:
    """What --plan prints."""
    head = (
        "Nothing was trained that a search would use. The space and the budget are counted; all "
        f"else is estimated from {len(forecast.timing.models)} proxies, each trained for at most "
        f"{MANY} steps, in {forecast.timing.seconds:.0f} s."
    )
    facts = [
        ("space", _space(forecast)),
        *(("budget", line) for line in _kept(forecast)),
        ("trial", _trial(forecast)),
        ("memory", _memory(forecast)),
        ("search", _search(forecast)),
        ("after it", _after(forecast)),
        ("end", _end(forecast)),
        ("training", f"{_between(forecast, 'train_flops', short)} FLOPs, controls included"),
        *(("failed", failure) for failure in forecast.timing.failures),
    ]
    return Group(Text(head, "bold"), "", TwoColumns(facts))


def _space(forecast: SearchForecast) -> str:
    found = forecast.survey
    size = "continuous" if found.size is None else f"{found.size:,} points"
    conflicts = f"; of {found.invalid} the choices do not go together" if found.invalid else ""
    models = f"; {found.distinct:,} different models"
    if forecast.interval is None:
        return f"{size}, {found.feasible:,} of which keep to the budget{conflicts}{models}"
    low, high = forecast.interval
    return (
        f"{size}; of {found.tried:,} drawn at random {found.feasible:,} keep to the budget "
        f"({low:.1%} to {high:.1%} of all draws, 95%){conflicts}{models}"
    )


def _kept(forecast: SearchForecast) -> list[str]:
    return [
        f"{least:,.0f} to {most:,.0f} of {limit:,} {LIMITS[name].unit}"
        for name, (limit, least, most) in forecast.kept.items()
    ]


def _trial(forecast: SearchForecast) -> str:
    first = (
        ""
        if forecast.trial == forecast.stopped
        else f"; {_seconds(forecast.stopped.seconds)} if stopped "
    )
    return (
        f"{_seconds(forecast.trial.seconds)} of one worker up to the last rung"
        f"{first and first + 'on the first'}"
    )


def _seconds(spread: Spread) -> str:
    return f"{_time(spread.mean)} ({_time(spread.least)} to {_time(spread.most)})"


def _memory(forecast: SearchForecast) -> str:
    workers = forecast.resources.workers
    whole = (
        f", {quantity(workers * forecast.peak_bytes, 'B')} for all {workers}" if workers > 1 else ""
    )
    return f"{quantity(forecast.peak_bytes, 'B')} for a worker at most{whole}"


def _search(forecast: SearchForecast) -> str:
    if forecast.all_promoted.trials < 1:
        flops = forecast.trial.flops.mean * (1 + forecast.after)
        return (
            "no trial and all that follows it fit into the means; that needs "
            f"{_time(_least_time(forecast))} and {short(flops)} training FLOPs"
        )
    if forecast.all_promoted.stops_at == "":
        return f"ended by {STOPS['']}"
    few, many = forecast.all_promoted.trials, forecast.all_stopped.trials
    count = f"{few:,.0f}" if few == many else f"{few:,.0f} to {many:,.0f}"
    how = "" if few == many else ", from all climbing to the last rung to all stopped on the first"
    return f"{count} trials{how}; ended by {STOPS[forecast.all_promoted.stops_at]}"


def _least_time(forecast: SearchForecast) -> float:
    return forecast.trial.seconds.mean * (1 + forecast.after) / forecast.resources.workers


def _after(forecast: SearchForecast) -> str:
    whole = forecast.all_promoted.seconds
    share = f", {forecast.seconds_after / whole:.0%} of the whole" if whole < float("inf") else ""
    return (
        f"{forecast.after:.0f} trainings of the winner, its controls and ablations, and of wider "
        f"proxies: {_time(forecast.seconds_after)}{share}"
    )


def _end(forecast: SearchForecast) -> str:
    workers = forecast.resources.workers
    if (
        forecast.all_promoted.stops_at == "time"
        and forecast.all_promoted.trials < 1
        and forecast.resources.seconds
    ):
        return f"after {_time(forecast.resources.seconds)}, with controls left undone"
    return f"after {_between(forecast, 'seconds', _time)} with {workers} worker{'s'[: workers - 1]}"


def _between(forecast: SearchForecast, what: str, words: Callable[[float], str]) -> str:
    ends = sorted({getattr(forecast.all_promoted, what), getattr(forecast.all_stopped, what)})
    if ends[-1] == float("inf"):
        return "no end: unlimited"
    return " to ".join(dict.fromkeys(map(words, ends)))


def _time(seconds: float) -> str:
    """``7.1 s``, ``2.5 min``, ``12 min``, ``3.5 h``."""
    unit, size = next((u, s) for u, s, most in UNITS if seconds < most)
    amount = seconds / size
    return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
