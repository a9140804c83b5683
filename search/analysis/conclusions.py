"""Conclusions of a comparison in plain sentences, which say no more than the intervals show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from archdsl.costs.receipt import Receipt, cost
from archdsl.lang.budget import limit_uses
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.reports.tables import short
from archdsl.search.analysis.baselines import WINNER
from archdsl.search.analysis.comparison import (
    OBJECTIVE,
    ComparisonEntry,
    differences,
    objectives,
    winner_of,
)
from archdsl.search.stats.paired import MOST_SEEDS, Difference, seeds_to_tell
from archdsl.search.trials.proxy import Proxy

Gaps = Mapping[str, Mapping[str, Difference]]  # by entry and task
ALLOWED = {"flops": "nominal FLOPs per token"}  # where the unit of a limit does not say which
WITHOUT = {"lower": "is worse", "higher": "is better", "cannot tell": "shows no clear difference"}
EACH = "each comparison by its own 95% interval"
ALIKE = 0.01  # costs that differ by less than this share count as equal


def conclusion(
    entries: Sequence[ComparisonEntry], proxy: Proxy, model: str = "the best model found"
) -> str:
    """Say whether the winner has a lower objective than its baselines, by how much, and how surely.

    ``model`` is what the winner is called, unless it is a given model that no search has chosen. A
    second sentence names the baselines that are cheaper and not shown to be worse.

    Each comparison uses its own 95% interval. The statement that all baselines are worse needs no
    correction for their number: if it is wrong, at least one baseline is not worse, and its own
    interval misses that in at most one case of forty. If only some baselines are worse, the
    sentence makes several statements and says that each has its own interval.
    """
    own = winner_of(entries)
    if own is None:
        return "No seed has been trained with all baselines yet, so nothing is known."
    searched = own.name == WINNER
    called, unseen = (model, " that the search did not use") if searched else (_subject(own), "")
    if own.error:
        return f"{_capital(called)} could not be trained: {own.error}."
    baselines = [entry for entry in entries if entry.role == "baseline"]
    if not baselines:
        return f"{_capital(called)} is a plain model, so it equals its baselines."
    totals = objectives(own, proxy)
    if math.inf in totals:
        seeds = f"{len(totals)} seeds" if len(totals) > 1 else "one seed"
        return f"{_capital(called)} diverged when trained with {seeds}{unseen}."
    gaps = differences([own, *baselines], proxy)
    sure = f"over {len(totals)} seeds{unseen} (95% interval for each difference)"
    if len(totals) == 1:
        sure = f"with one seed{unseen} (one seed: no interval)"
    return " ".join(
        [
            f"{_capital(called)} {_better_than(baselines, gaps)}: {sure}, "
            f"{_listed(baselines, gaps)}.",
            *_cheaper(own, baselines, gaps),
            *_seeds_that_would_tell(baselines, gaps, len(totals)),
        ]
    )


def _seeds_that_would_tell(
    baselines: Sequence[ComparisonEntry], gaps: Gaps, seeds: int
) -> Iterator[str]:
    """Say how many seeds would tell the differences that cannot be told."""
    known = [gaps[entry.name][OBJECTIVE] for entry in baselines if not entry.error]
    unclear = [g for g in known if g.conclusion == "cannot tell" and math.isfinite(g.mean)]
    if seeds < 2 or not unclear:
        return
    needed = [seeds_to_tell(gap.deviation, gap.mean, 1) for gap in unclear]
    least = min((n for n in needed if n is not None), default=None)
    many = f"about {max(seeds + 1, least)}" if least else f"more than {MOST_SEEDS:,}"
    which = "that difference" if len(unclear) == 1 else "the clearest of those differences"
    yield f"To tell {which} from zero, if it is as measured, takes {many} seeds."


def _subject(own: ComparisonEntry) -> str:
    return "the best model found" if own.name == WINNER else f"the {own.name}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _better_than(baselines: Sequence[ComparisonEntry], gaps: Gaps) -> str:
    """Say how many of the baselines are worse than the winner."""
    known = [gaps[entry.name][OBJECTIVE] for entry in baselines if not entry.error]
    better = sum(gap.conclusion == "lower" and math.isfinite(gap.mean) for gap in known)
    count = len(baselines)
    all_of_them = "its only baseline" if count == 1 else f"its {count} baselines"
    if not better:
        return f"is not shown to be better than {'any of ' if count > 1 else ''}{all_of_them}"
    share = "" if count == 1 else "all of " if better == count else f"{better} of "
    return f"is better than {share}{all_of_them}"


def _listed(baselines: Sequence[ComparisonEntry], gaps: Gaps) -> str:
    """Say by how much the winner's loss differs from that of each baseline."""
    clear, unclear, rest = [], [], []
    for entry in baselines:
        name = f"the {entry.name} baseline"
        gap = None if entry.error else gaps[entry.name][OBJECTIVE]
        if gap is None or not math.isfinite(gap.mean):
            rest.append(f"{name} {'diverged' if gap else 'failed'}")
        elif gap.conclusion == "cannot tell" and gap.pairs > 1:
            unclear.append(f"{name} ({_amount(gap)})")
        else:
            clear.append(f"{_amount(gap)} {name}")
    phrases = [_joined(clear)] if clear else []
    phrases += [f"not clearly different from {_joined(unclear)}"] if unclear else []
    losses = [f"its loss is {', '.join(phrases)}"] if phrases else []
    return "; ".join([*losses, *rest])


def _joined(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _amount(gap: Difference) -> str:
    """Return ``0.310 ± 0.020 nats below``: how far the winner's loss lies from the baseline's."""
    width = f" ± {gap.half_width:.3f}" if gap.pairs > 1 else ""
    return f"{abs(gap.mean):.3f}{width} nats {'below' if gap.mean >= 0 else 'above'}"


def _cheaper(
    own: ComparisonEntry, baselines: Sequence[ComparisonEntry], gaps: Gaps
) -> Iterator[str]:
    """Name the baselines that cost less than the winner and are better, or not shown to be worse.

    With one seed, which shows nothing, those are named that are not worse with it.
    """
    found: dict[str, list[str]] = {"better": [], "not shown to be worse": []}
    for entry in baselines:
        if entry.error or not (costs := _lower_costs(entry.receipt, own.receipt)):
            continue
        gap = gaps[entry.name][OBJECTIVE]
        if gap.conclusion == "higher":
            found["better"].append(f"the {entry.name} baseline ({costs})")
        elif gap.conclusion == "cannot tell" and (gap.pairs > 1 or gap.mean <= 0):
            found["not shown to be worse"].append(f"the {entry.name} baseline ({costs})")
    for how, names in found.items():
        if names:
            yield f"Cheaper and {how}: {_joined(names)}."


def _lower_costs(cheap: Receipt, dear: Receipt) -> str:
    """Return what ``cheap`` costs less of; empty if it costs more of something."""
    costs = {
        "parameters": (cheap.params, dear.params),
        "nominal FLOPs per token": (cheap.expected, dear.expected),
        "bytes of KV cache per token": (cheap.kv_bytes_per_token, dear.kv_bytes_per_token),
    }
    if any(one > other * (1 + ALIKE) for one, other in costs.values()):
        return ""
    lower = {name: pair for name, pair in costs.items() if pair[0] < pair[1] * (1 - ALIKE)}
    return ", ".join(f"{short(one)} {name}" for name, (one, _) in list(lower.items())[:2])


def costs_sentence(spec: ModelSpec, budget: Budget, executed: float | None) -> str:
    """Say what a model costs of what was allowed.

    ``executed`` are its forward FLOPs per token at the shares that routers selected; None if they
    were not measured.
    """
    receipt = cost(spec)
    uses = [
        f"{short(use.spent)} of the {short(use.limit)} {ALLOWED.get(name, use.unit)} allowed"
        for name, use in limit_uses(spec, budget).items()
    ]
    parts = [f"It costs {' and '.join(uses)}." if uses else "No limit on its costs was set."]
    if "params" not in budget.of_model:
        parts.append(f"It has {short(receipt.params)} parameters.")
    nominal = f"{short(receipt.expected)} FLOPs at the routers' capacities (nominal)"
    if executed is None:
        parts.append(f"A token takes {nominal}; those executed were not measured.")
    elif short(executed) == short(receipt.expected):
        parts.append(f"A token takes {short(executed)} FLOPs, nominal and executed.")
    else:
        parts.append(
            f"A token takes {nominal}, and {short(executed)} at the shares of tokens that its "
            "proxies' routers selected (executed)."
        )
    return " ".join(parts)


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
