"""Tables of a comparison: costs, losses, and differences from the winner."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.text import Text

from archdsl.reports.layout import StackingTable, TwoColumns
from archdsl.reports.tables import parameters, short
from archdsl.search.analysis.comparison import ComparisonEntry, differences, winner_of
from archdsl.search.analysis.conclusions import ablation_conclusion, conclusion

if TYPE_CHECKING:
    from archdsl.search.analysis.ablation import ModelComparison
    from archdsl.search.trials.proxy import Proxy


FLOPS_LEGEND = (
    "of a forward pass, per token; nominal: full size, at the routers' capacities; executed: full "
    "size, at the shares of tokens that the routers of the proxies selected; proxy: executed by "
    "the proxy, as a share of the winner's"
)
LOSS_LEGEND = "held-out nats per prediction, mean over the seeds"


@contextmanager
def saying() -> Iterator[Callable[[str], None]]:
    """Show progress on stderr: one changing line in a terminal, else a line for each change."""
    started, said = time.monotonic(), [""]

    def tell(text: str) -> None:
        if text != said[-1]:
            said.append(text)
            print(f"{time.monotonic() - started:.0f} s; {text}", file=sys.stderr, flush=True)

    if sys.stderr.isatty():
        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(f"{time.monotonic() - started:.0f} s; {text}")
    else:
        yield tell


def result(found: ModelComparison) -> RenderableType:
    """Return what ``archdsl ablate`` and ``archdsl search --confirm`` print at their end."""
    parts: list[RenderableType] = []
    if found.entries:
        own = found.entries[0].name
        parts += [Text("Held-out loss in nats, mean over the seeds", "bold")]
        parts += [comparison_table(found.entries, found.proxy), ""]
        parts += [Text(f"Loss above that of the {own}, with the 95% interval", "bold")]
        parts += [difference_table(found.entries, found.proxy), ""]
    facts = comparison_legend(found.entries)
    facts += failures(found.entries)
    if found.missing:
        missing = f"{found.missing} trainings; run the same command again to continue"
        facts.append(("missing", missing))
    facts.append(("files", str(found.folder / found.file)))
    if matters := ablation_conclusion(found.entries, found.proxy):
        facts.append(("parts", matters))
    facts.append(("conclusion", conclusion(found.entries, found.proxy)))
    return Group(*parts, TwoColumns(facts))


def comparison_table(entries: Sequence[ComparisonEntry], proxy: Proxy) -> StackingTable:
    """Return a table of costs and losses, which `comparison_legend` explains."""
    own = winner_of(entries)
    table = StackingTable("", "params", "nominal", "executed", "proxy", *proxy.tasks)
    for entry in entries:
        table.add_row(
            entry.name,
            parameters(entry.receipt.params),
            short(entry.receipt.expected),
            "" if entry.executed is None else short(entry.executed),
            _share(_flops(entry), _flops(own) if own else 0.0),
            *(_mean(entry, task) for task in proxy.tasks),
        )
    return table


def difference_table(entries: Sequence[ComparisonEntry], proxy: Proxy) -> StackingTable:
    """Return a table of how many nats each loss is above the winner's, with the 95% interval."""
    found = differences(entries, proxy)
    table = StackingTable("", "objective", *proxy.tasks)
    for entry in entries:
        if entry.name in found:
            table.add_row(entry.name, *(str(gap) for gap in found[entry.name].values()))
        elif entry.error:
            table.add_row(entry.name, "failed")
    return table


def comparison_legend(entries: Sequence[ComparisonEntry]) -> list[tuple[str, str]]:
    """Return what the figures of a `comparison_table` are; nothing for an empty table."""
    if not entries:
        return []
    of_text = any(_bits(entry, task) for entry in entries for task in entry.scores)
    bits = "; in brackets the bits per byte of a text" if of_text else ""
    return [("FLOPs", FLOPS_LEGEND), ("losses", f"{LOSS_LEGEND}{bits}")]


def failures(entries: Sequence[ComparisonEntry]) -> list[tuple[str, str]]:
    """Return a line for each entry whose training failed, with the reason."""
    return [("failed", f"{entry.name}: {entry.error}") for entry in entries if entry.error]


def _flops(entry: ComparisonEntry) -> float:
    """Return the executed FLOPs per token of the proxies; 0 if they are not known."""
    known = [s.flops_per_token for of_task in entry.scores.values() for s in of_task]
    return fmean([flops or 0.0 for flops in known]) if known else 0.0


def _share(flops: float, of: float) -> str:
    return f"{flops / of:.0%}" if flops and of else ""


def _bits(entry: ComparisonEntry, task: str) -> list[float]:
    return [s.bits_per_byte for s in entry.scores[task] if s.bits_per_byte is not None]


def _mean(entry: ComparisonEntry, task: str) -> str:
    losses, bits = entry.losses(task), _bits(entry, task)
    if not losses:
        return ""
    return f"{fmean(losses):.3f}{f' ({fmean(bits):.3f})' if bits else ''}"
