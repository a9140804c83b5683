"""Conclusions of a comparison in plain sentences, which say no more than the intervals show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from archdsl.search.analysis.baselines import WINNER
from archdsl.search.analysis.comparison import (
    OBJECTIVE,
    ComparisonEntry,
    differences,
    objectives,
    winner_of,
)
from archdsl.search.stats.paired import Difference
from archdsl.search.trials.proxy import Proxy

BETTER, WORSE, UNCLEAR = "it is better than", "it is worse than", "no clear difference from"
CLAUSES = {"lower": BETTER, "higher": WORSE, "cannot tell": UNCLEAR}
WITHOUT = {"lower": "is worse", "higher": "is better", "cannot tell": "shows no clear difference"}
EACH = "each comparison by its own 95% interval"


def conclusion(entries: Sequence[ComparisonEntry], proxy: Proxy) -> str:
    """Say in one sentence whether the winner has a lower objective than its baselines.

    Each comparison uses its own 95% interval. The statement that all baselines are worse needs no
    correction for their number: if it is wrong, at least one baseline is not worse, and its own
    interval misses that in at most one case of forty. If only some baselines are worse, the
    sentence makes several statements and says that each has its own interval.
    """
    own = winner_of(entries)
    if own is None:
        return "No seed has been trained with all baselines yet, so nothing is known."
    model = _subject(own)
    if own.error:
        return f"{_capital(model)} could not be trained: {own.error}."
    baselines = [entry for entry in entries if entry.role == "baseline"]
    if not baselines:
        return f"{_capital(model)} is a plain model, so it equals its baselines."
    totals = objectives(own, proxy)
    seeds = f"{len(totals)} seeds that were" if len(totals) > 1 else "one seed that was"
    if math.inf in totals:
        return f"{_capital(model)} diverged when trained with {seeds} not used in the search."
    found = _by_clause(baselines, differences([own, *baselines], proxy))
    clauses = "; ".join(_clause(clause, names) for clause, names in found.items())
    better, count = len(found.get(BETTER, ())), len(baselines)
    note = "" if better == count else f" ({EACH})"
    return (
        f"With {seeds} not used in the search, {model} {_better_than(better, count)}: "
        f"{clauses}{note}."
    )


def _subject(own: ComparisonEntry) -> str:
    return "the best model found" if own.name == WINNER else f"the {own.name}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _better_than(better: int, count: int) -> str:
    """Say how many of ``count`` baselines are worse than the winner."""
    baselines = "its only baseline" if count == 1 else f"its {count} baselines"
    if not better:
        return f"is not shown to be better than {'any of ' if count > 1 else ''}{baselines}"
    share = "" if count == 1 else "all of " if better == count else f"{better} of "
    return f"is better than {share}{baselines}"


def _by_clause(
    baselines: Sequence[ComparisonEntry], gaps: Mapping[str, Mapping[str, Difference]]
) -> dict[str, list[str]]:
    """Return the names of the baselines by what is said of them, the best news first."""
    found: dict[str, list[str]] = {
        clause: [] for clause in (*CLAUSES.values(), "diverged", "failed")
    }
    for entry in baselines:
        if entry.error:
            found["failed"].append(entry.name)
        elif not math.isfinite((gap := gaps[entry.name][OBJECTIVE]).mean):
            found["diverged"].append(entry.name)
        else:
            found[CLAUSES[gap.conclusion]].append(entry.name)
    return {clause: names for clause, names in found.items() if names}


def _clause(clause: str, names: Sequence[str]) -> str:
    if clause in ("diverged", "failed"):
        return f"{_listed(names)} {clause}"
    return f"{clause} {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    *others, last = (f"the {name} baseline" for name in names)
    return f"{', '.join(others)} and {last}" if others else last


def ablation_conclusion(entries: Sequence[ComparisonEntry], proxy: Proxy) -> str:
    """Say in one sentence which parts the winner needs; an empty text if there are no ablations."""
    own = winner_of(entries)
    gaps = differences([entry for entry in entries if entry.role != "baseline"], proxy)
    found = {
        clause: [name for name, gap in gaps.items() if gap[OBJECTIVE].conclusion == told]
        for told, clause in WITHOUT.items()
    }
    clauses = [f"{clause} {', '.join(names)}" for clause, names in found.items() if names]
    if own is None or not clauses:
        return ""
    return f"{_capital(_subject(own))} {'; it '.join(clauses)} ({EACH})."
