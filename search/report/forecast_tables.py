"""The forecast of a search as printed by ``archdsl search --plan``."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.text import Text

from archdsl.lang.budget import LIMITS
from archdsl.reports.layout import TwoColumns
from archdsl.reports.tables import quantity, short
from archdsl.search.analysis.forecast import SearchForecast, Spread
from archdsl.search.analysis.timing import MANY

STOPS = {
    "models": "ends when every model of the space has been tried",
    "trials": "ends with --trials",
    "time": "ends with --time",
    "train_flops": "ends with --train-flops",
    "": "never ends; give --time, --trials or --train-flops",
}
UNITS = [("s", 1, 100), ("min", 60, 6000), ("h", 3600, float("inf"))]  # unit, seconds, used below


def shown(forecast: SearchForecast) -> RenderableType:
    """Return what ``archdsl search --plan`` prints."""
    head = (
        "Forecast only; nothing was searched. Space and budget are counted. Everything else is "
        f"estimated from {len(forecast.timing.models)} proxies, each trained for at most {MANY} "
        f"steps, in {forecast.timing.seconds:.0f} s."
    )
    facts = [
        ("space", _space(forecast)),
        *(("budget", line) for line in _kept(forecast)),
        ("trial", _trial(forecast)),
        ("memory", _memory(forecast)),
        ("search", _search(forecast)),
        ("evaluation", _after(forecast)),
        ("duration", _end(forecast)),
        ("training", f"{_between(forecast, 'train_flops', short)} FLOPs, evaluation included"),
        *(("failed", failure) for failure in forecast.timing.failures),
    ]
    return Group(Text(head, "bold"), "", TwoColumns(facts))


def _space(forecast: SearchForecast) -> str:
    found = forecast.survey
    size = "continuous" if found.size is None else f"{found.size:,} points"
    invalid = f"; {found.invalid} have invalid combinations of choices" if found.invalid else ""
    models = f"; {found.distinct:,} different models"
    if forecast.interval is None:
        return f"{size}, {found.feasible:,} of which fit the budget{invalid}{models}"
    low, high = forecast.interval
    return (
        f"{size}; of {found.tried:,} random points {found.feasible:,} fit the budget "
        f"(95% interval of the share: {low:.1%} to {high:.1%}){invalid}{models}"
    )


def _kept(forecast: SearchForecast) -> list[str]:
    return [
        f"{least:,.0f} to {most:,.0f} of {limit:,} {LIMITS[name].unit}"
        for name, (limit, least, most) in forecast.kept.items()
    ]


def _trial(forecast: SearchForecast) -> str:
    whole = f"{_seconds(forecast.trial.seconds)} of one worker up to the last rung"
    if forecast.trial == forecast.stopped:
        return whole
    return f"{whole}; {_seconds(forecast.stopped.seconds)} if stopped on the first rung"


def _seconds(spread: Spread) -> str:
    return f"{_time(spread.mean)} ({_time(spread.least)} to {_time(spread.most)})"


def _memory(forecast: SearchForecast) -> str:
    workers = forecast.resources.workers
    whole = (
        f", {quantity(workers * forecast.peak_bytes, 'B')} for all {workers}" if workers > 1 else ""
    )
    return f"at most {quantity(forecast.peak_bytes, 'B')} for a worker{whole}"


def _search(forecast: SearchForecast) -> str:
    if forecast.all_promoted.trials < 1:
        flops = forecast.trial.flops.mean * (1 + forecast.after)
        return (
            "the limits are too low for one trial and the evaluation, which take "
            f"{_time(_least_time(forecast))} and {short(flops)} training FLOPs"
        )
    if forecast.all_promoted.stops_at == "":
        return STOPS[""]
    few, many = forecast.all_promoted.trials, forecast.all_stopped.trials
    count = f"{few:,.0f}" if few == many else f"{few:,.0f} to {many:,.0f}"
    how = "" if few == many else " (if all reach the last rung, or all stop on the first)"
    return f"{count} trials{how}; {STOPS[forecast.all_promoted.stops_at]}"


def _least_time(forecast: SearchForecast) -> float:
    return forecast.trial.seconds.mean * (1 + forecast.after) / forecast.resources.workers


def _after(forecast: SearchForecast) -> str:
    whole = forecast.all_promoted.seconds
    share = f", {forecast.seconds_after / whole:.0%} of the total" if whole < float("inf") else ""
    return (
        f"the cost of {forecast.after:.0f} trainings of a trial, for the winner, its baselines and "
        f"--validate-proxy: {_time(forecast.seconds_after)}{share}"
    )


def _end(forecast: SearchForecast) -> str:
    workers = forecast.resources.workers
    if (
        forecast.all_promoted.stops_at == "time"
        and forecast.all_promoted.trials < 1
        and forecast.resources.seconds
    ):
        return f"{_time(forecast.resources.seconds)}, too short for all baselines"
    return f"{_between(forecast, 'seconds', _time)} with {workers} worker{'s'[: workers - 1]}"


def _between(forecast: SearchForecast, what: str, words: Callable[[float], str]) -> str:
    ends = sorted({getattr(forecast.all_promoted, what), getattr(forecast.all_stopped, what)})
    if ends[-1] == float("inf"):
        return "unlimited"
    return " to ".join(dict.fromkeys(map(words, ends)))


def _time(seconds: float) -> str:
    """Write a duration as ``7.1 s``, ``2.5 min``, ``12 min`` or ``3.5 h``."""
    unit, size = next((u, s) for u, s, most in UNITS if seconds < most)
    amount = seconds / size
    return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
