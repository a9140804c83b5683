"""What a contest says in words, and nothing that its intervals do not allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from archdsl.search.analysis.comparison import (
    OBJECTIVE,
    ComparisonEntry,
    differences,
    objectives,
    winner_of,
)
from archdsl.search.stats.paired import Difference
from archdsl.search.trials.proxy import Proxy

SAID = {
    "lower": "beats",
    "higher": "loses to",
    "cannot tell": "cannot be told from",
}
EACH = "95% intervals, each for itself"


def conclusion(entries: Sequence[ComparisonEntry], proxy: Proxy) -> str:
    """In one sentence, whether the winner beats its controls in the objective.

    Each comparison is by its own 95% interval. To say that all controls are beaten takes no
    correction for their number: where one is not, its own interval lets that be said in at most one
    case of forty. Where only some are, the sentence is as many statements, and says so.
    """
    own = winner_of(entries)
    baselines = [entry for entry in entries if entry.role == "control"]
    if own is None:
        return "No seed was trained with all of the controls: nothing is known yet."
    if own.error:
        return f"The {own.name} could not be trained: {own.error}."
    if not baselines:
        return f"The {own.name} is plain, nothing in it thinks: it is its own control."
    totals = objectives(own, proxy)
    seeds = f"{len(totals)} seeds" if len(totals) > 1 else "one seed"
    if math.inf in totals:
        return f"The {own.name} diverged, trained with {seeds} that chose nothing."
    said = _said(baselines, differences([own, *baselines], proxy))
    beaten = len(said.get("beats", ()))
    share = {0: "none", len(baselines): "all"}.get(beaten, str(beaten))
    parts = "; ".join(_clause(words, names) for words, names in said.items())
    caution = "" if beaten == len(baselines) else f" ({EACH})"
    return (
        f"Over {seeds} that chose nothing, the {own.name} beats {share} of its controls: "
        f"{parts}{caution}."
    )


def _said(
    baselines: Sequence[ComparisonEntry], gaps: Mapping[str, Mapping[str, Difference]]
) -> dict[str, list[str]]:
    """Names by what is said of them, the best first."""
    said: dict[str, list[str]] = {words: [] for words in (*SAID.values(), "diverged", "failed")}
    for entry in baselines:
        if entry.error:
            said["failed"].append(entry.name)
        elif not math.isfinite((gap := gaps[entry.name][OBJECTIVE]).mean):
            said["diverged"].append(entry.name)
        else:
            said[SAID[gap.conclusion]].append(entry.name)
    return {words: names for words, names in said.items() if names}


def _clause(words: str, names: Sequence[str]) -> str:
    if words in ("diverged", "failed"):
        return f"{_listed(names)} {words}"
    return f"it {words} {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    *others, last = (f"the {name} twin" for name in names)
    return f"{', '.join(others)} and {last}" if others else last


def ablation_conclusion(entries: Sequence[ComparisonEntry], proxy: Proxy) -> str:
    """In one sentence, what the winner is worse without; empty if nothing was taken out."""
    gaps = differences([entry for entry in entries if entry.role != "control"], proxy)
    words = {
        "lower": "is worse",
        "higher": "is better",
        "cannot tell": "cannot be told from itself",
    }
    found = {
        said: [name for name, gap in gaps.items() if gap[OBJECTIVE].conclusion == told]
        for told, said in words.items()
    }
    parts = [f"{said} {', '.join(names)}" for said, names in found.items() if names]
    own = winner_of(entries)
    return f"The {own.name} {'; it '.join(parts)} ({EACH})." if own and parts else ""
