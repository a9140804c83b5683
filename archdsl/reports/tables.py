"""Tables that the commands print with rich: receipts, evaluations, dial sweeps and task scores."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from archdsl.costs.devices import ONE, Devices, Traffic, traffic
from archdsl.costs.receipt import Receipt, cost, paper_flops
from archdsl.lang.budget import limit_uses
from archdsl.lang.spec import Budget, ModelSpec, to_tree, walk
from archdsl.reports.layout import StackingTable, TwoColumns, wrapped
from archdsl.reports.outline import OutlineNode, outline
from archdsl.reports.training_memory import TrainingMemory, training_memory

if TYPE_CHECKING:
    from archdsl.evaluation.dial_sweep import DialSetting, SweepPoint
    from archdsl.evaluation.evaluate import Evaluation
    from archdsl.evaluation.lm_eval_model import TaskScores

Convention = Literal["node", "paper"]

COUNTED = {
    "node": "node by node: a multiply-add is 2 FLOPs; only matrix products count; attention counts "
    "all pairs of queries and keys; shared weights count each time they run; an embedding lookup "
    "is free",
    "paper": "as in Chen et al. 2025 (arXiv 2502.13842): parameters in matrices; FLOPs are 2 x "
    "parameters x tokens plus attention, times the mean number of passes per layer, also for "
    "embedding and head, although these run once",
}
LEAKS = "(leaks)"
LEAST_ROOM = 24  # columns for the labels of a tree; with less its figures stand below them
ASCII = str.maketrans("├└│─", "|`|-")
LEAK = (
    "selects tokens by looking at later ones: this is possible in training but not in decoding; "
    "router.kind=prefix is causal"
)


def short(number: float) -> str:
    """Formats a number with three or four digits and a unit prefix; exact below a thousand.

    >>> short(162_051_072), short(0.5), short(3.853e12)
    ('162.1M', '0.5', '3.85T')
    """
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{1 if scaled >= 10 else 2}f}{unit}"
    return f"{number:g}"


def quantity(number: float, unit: str) -> str:
    """Formats a number with a unit, as in ``3.85 TFLOPs`` or ``648.2 MB``."""
    text = short(number)
    prefix = text[-1] if text[-1].isalpha() else ""
    return f"{text.removesuffix(prefix)} {prefix}{unit}"


def parameters(number: float) -> str:
    """Formats a number of parameters as in the names of models: ``162.1M``, ``1.20B``."""
    return short(number).replace("G", "B")


def receipt_data(
    spec: ModelSpec, convention: Convention, budget: Budget | None, devices: Devices | None = None
) -> dict[str, Any]:
    """Returns the receipt as data for JSON; the FLOPs of nodes are per full context.

    ``devices``: those to train on, for which it says what each of them needs.
    """
    root = outline(spec)
    return {
        "name": spec.name,
        "fingerprint": spec.fingerprint(),
        "convention": convention,
        "counted": COUNTED[convention],
        "receipt": cost(spec)._asdict(),
        "training_memory": _memory_data(spec),
        "devices": devices and _devices_data(spec, devices),
        "training": _training_data(spec),
        "paper": {"parameters": root.cost.matrices, "flops_per_context": paper_flops(spec)},
        "leaks": [node.path for node in root.walk() if node.leaks],
        "budget": budget and _budget_data(spec, budget),
        "tree": _node_data(root),
    }


def _memory_data(spec: ModelSpec, devices: Devices = ONE) -> dict[str, dict[str, int]]:
    needs = {
        name: training_memory(spec, checkpointed=name == "checkpointed", devices=devices)
        for name in ("stored", "checkpointed")
    }
    return {name: asdict(need) | {"peak": need.peak} for name, need in needs.items()}


def _devices_data(spec: ModelSpec, devices: Devices) -> dict[str, Any]:
    """What each device needs: memory for one sequence, and the bytes that it sends per step."""
    sent = _traffic(spec, devices)
    return {
        **devices._asdict(),
        "training_memory": _memory_data(spec, devices),
        "bytes_sent_per_step": sent._asdict() | {"total": sent.total},
    }


def _traffic(spec: ModelSpec, devices: Devices) -> Traffic:
    from archdsl.reports.units import units  # needs torch

    return traffic(units(spec), devices)


def _training_data(spec: ModelSpec) -> dict[str, Any] | None:
    """The rule of training as written, and the numbers of passes that are drawn, equally likely."""
    if spec.training is None:
        return None
    return to_tree(spec.training) | {"depths": list(spec.training_depths)}


def _budget_data(spec: ModelSpec, budget: Budget) -> dict[str, dict[str, float]]:
    """The budget by limit. ``over`` is ``spent / limit - 1``; below zero the limit is met."""
    limits = limit_uses(spec, budget).items()
    return {
        "limits": {name: found.limit for name, found in limits},
        "spent": {name: found.spent for name, found in limits},
        "over": {name: found.ratio for name, found in limits},
    }


def _node_data(node: OutlineNode) -> dict[str, Any]:
    return {
        "path": node.path,
        "label": node.label,
        "params": node.cost.params,
        "flops_per_context": node.cost.flops,
        "leaks": node.leaks,
        "below": [_node_data(child) for child in node.below],
    }


def receipt(
    spec: ModelSpec, convention: Convention, budget: Budget | None, devices: Devices | None = None
) -> RenderableType:
    """Returns the receipt as a table: the tree of nodes, and below it the totals.

    ``devices``: those to train on, for which it says what each of them needs.
    """
    root, total = outline(spec), cost(spec)
    facts = (
        _paper(spec, root)
        if convention == "paper"
        else [*_node_by_node(spec, total), *_memory(spec)]
    )
    facts += _on(devices, spec) if devices else []
    facts += [("counted", COUNTED[convention])]
    facts += [("leak", f"{node.path} {LEAK}") for node in root.walk() if node.leaks]
    facts += [("budget", line) for line in _budget_lines(spec, budget)] if budget else []
    head = (
        f"{spec.name}: {parameters(total.matrices)} parameters in matrices, {total.params:,} in all"
    )
    tree = CostTree(root, spec.context, convention)
    return Group(Text(head, "bold"), "", tree, "", TwoColumns(facts))


@dataclass(frozen=True)
class CostTree:
    """A renderable tree of nodes with their figures. Labels that are too long are wrapped."""

    root: OutlineNode
    context: int
    convention: Convention

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        figures = {"parameters": 13, "FLOPs/token": 11, "share": 6}
        if self.convention == "paper":
            figures = {"parameters": 13}
        room = options.max_width - sum(figures.values()) - 2 * len(figures)
        if narrow := room < LEAST_ROOM:
            lines = list(self._stacked(figures, options.max_width))
        else:
            lines = list(self._beside(figures, room))
        for line in lines:
            text = Text(line.translate(ASCII) if options.ascii_only else line)
            text.highlight_words([LEAKS], "bold red")
            yield text if narrow or line is not lines[0] else Text(line, "dim")

    def _beside(self, figures: Mapping[str, int], room: int) -> Iterator[str]:
        lines = [
            (line, node if first else None)
            for node, lead, rest in _branches(self.root)
            for first, line in _wrapped(node, lead, rest, room)
        ]
        width = max(len(line) for line, _ in lines)
        yield " " * width + _figures(figures, figures)
        for line, node in lines:
            yield line if node is None else line.ljust(width) + _figures(self._of(node), figures)

    def _stacked(self, titles: Iterable[str], width: int) -> Iterator[str]:
        """Each node, and in the lines below it its figures without the share, which follows."""
        for node, lead, rest in _branches(self.root):
            yield from (line for _, line in _wrapped(node, lead, rest, width))
            pairs = list(zip(self._of(node), titles, strict=False))[:2]
            told = ", ".join(f"{figure}\N{NO-BREAK SPACE}{title}" for figure, title in pairs)
            for line in wrapped(told, width - len(rest) - 2):
                yield f"{rest}  {line}".replace("\N{NO-BREAK SPACE}", " ")

    def _of(self, node: OutlineNode) -> list[str]:
        flops = node.cost.flops
        share = f"{flops / self.root.cost.flops:.1%}"
        return [f"{node.cost.params:,}", short(flops / self.context), share]


def _figures(values: Iterable[str], widths: Mapping[str, int]) -> str:
    return "".join(
        f"  {value:>{width}}" for value, width in zip(values, widths.values(), strict=False)
    )


def _branches(
    node: OutlineNode, lead: str = "", rest: str = ""
) -> Iterator[tuple[OutlineNode, str, str]]:
    """Yields each node with the lines drawn to its left, for its first line and for the others."""
    yield node, lead, rest + ("│  " if node.below else "   ")
    for child in node.below:
        branch, under = ("└─ ", "   ") if child is node.below[-1] else ("├─ ", "│  ")
        yield from _branches(child, rest + branch, rest + under)


def _wrapped(node: OutlineNode, lead: str, rest: str, room: int) -> Iterator[tuple[bool, str]]:
    label = f"{node.label} {LEAKS}" if node.leaks else node.label
    room = max(room, len(rest) + 8)
    lines = textwrap.wrap(
        label, room, initial_indent=lead, subsequent_indent=rest, break_on_hyphens=False
    )
    for i, line in enumerate(lines):
        yield i == 0, line


def _node_by_node(spec: ModelSpec, total: Receipt) -> list[tuple[str, str]]:
    return [
        (
            "parameters",
            f"{total.params:,} ({parameters(total.params)}); {parameters(total.matrices)} in "
            f"matrices, as papers count them; {parameters(total.non_embedding)} "
            "without embedding and head",
        ),
        *_active(total),
        ("forward", _forward(spec, total)),
        (
            "",
            f"{quantity(total.flops_per_context, 'FLOPs')} per context of {total.context:,} tokens",
        ),
        ("training", f"{short(total.train_flops_per_token)} FLOPs/token"),
        *_drawn(spec),
        ("KV cache", _cache(total)),
    ]


def _drawn(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """What training draws and what its loss is of."""
    if spec.training and spec.training.loss == "every_step":
        yield "", "the loss is of every pass of the last loop"
    if spec.training and spec.training.capacity:
        share = spec.training.capacity.warmup
        yield "", f"capacities fall from 1 to their own in the first {share:.0%} of the steps"
    depth, sizes = spec.depth_law, spec.training_depths
    if depth is None:
        return
    words = f"on average, with {', '.join(map(str, sizes))} passes, equally likely, per {depth.per}"
    if len(set(sizes)) == 1:
        words = f"with {sizes[0]} passes"
    if depth.backprop_last is not None:
        words += f"; gradients through the last {depth.backprop_last}"
    yield "", words


def _active(total: Receipt) -> list[tuple[str, str]]:
    """A line where a token uses some of the experts alone."""
    if total.active == total.params:
        return []
    return [("active", f"{total.active:,} ({parameters(total.active)}) used by each token")]


def _memory(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    where = f"training in float32 on one sequence of {spec.context:,} tokens"
    yield "memory", f"{where}: {memory_parts(training_memory(spec))}"
    yield from _peaks(spec, ONE)


def memory_parts(need: TrainingMemory, optimizer: str = "AdamW") -> str:
    """Returns the parts of the memory of a training step, in words."""
    sizes = {
        "weights": need.weights,
        "weights gathered at the peak": need.gathered,
        "gradients at the peak": need.gradients_at_peak,
        "activations": need.activations,
        optimizer: need.optimizer,
    }
    return ", ".join(f"{part} {quantity(size, 'B')}" for part, size in sizes.items() if size)


def _peaks(spec: ModelSpec, devices: Devices) -> Iterator[tuple[str, str]]:
    for how in ("", " with activation checkpointing"):
        one, two = (
            training_memory(spec, n, checkpointed=bool(how), devices=devices).peak for n in (1, 2)
        )
        each = f"{quantity(two - one, 'B')} more for each further sequence"
        yield "", f"{quantity(one, 'B')} in total{how}, {each}"


def _on(devices: Devices, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """The memory of each of several devices, and what it sends to the others."""
    count = f"{devices.number} devices"
    groups = f" in groups of {devices.shards}" if devices.parallel == "hsdp" else ""
    yield (
        count,
        f"{devices.parallel}{groups}, each with one sequence: "
        f"{memory_parts(training_memory(spec, devices=devices))}",
    )
    yield from _peaks(spec, devices)
    yield "", f"each sends {sent_parts(_traffic(spec, devices))}"


def sent_parts(sent: Traffic) -> str:
    """Returns what a device sends for an optimizer step, in words."""
    sizes = ", ".join(
        f"{name.replace('_', '-')} {quantity(size, 'B')}"
        for name, size in sent._asdict().items()
        if size
    )
    return f"{quantity(sent.total, 'B')} per optimizer step{sizes and ': ' + sizes}"


def _cache(total: Receipt) -> str:
    words = f"{quantity(total.kv_bytes_per_token, 'B')} per token in bfloat16"
    if total.state_bytes:
        words += f"; besides {quantity(total.state_bytes, 'B')} of state for each sequence"
    return words


def _forward(spec: ModelSpec, total: Receipt) -> str:
    if total.lightest == total.heaviest:
        return f"{short(total.expected)} FLOPs/token"
    at = ("the routers' capacities", "that no router selects", "that every router selects")
    if any(part.family == "exit" for _, part in walk(spec)):
        at = (
            "the shares of remaining tokens that the spec states",
            "that takes as few passes as it can",
            "that takes every pass",
        )
    return (
        f"{short(total.expected)} FLOPs/token at {at[0]}; "
        f"{short(total.lightest)} for a token {at[1]}, "
        f"{short(total.heaviest)} for one {at[2]}"
    )


def _paper(spec: ModelSpec, root: OutlineNode) -> list[tuple[str, str]]:
    return [
        ("parameters", f"{parameters(root.cost.matrices)} in matrices"),
        ("forward", f"{quantity(paper_flops(spec), 'FLOPs')} per {spec.context:,} tokens"),
    ]


def _budget_lines(spec: ModelSpec, budget: Budget) -> Iterator[str]:
    for found in limit_uses(spec, budget).values():
        ratio = found.ratio
        result = f"exceeded by {ratio:.2%}" if ratio > 0 else f"met, {-ratio:.2%} below the limit"
        yield f"{result}: {found.spent:,.0f} of {found.limit:,} {found.unit}"


def evaluation(found: Evaluation, chance: float | None) -> RenderableType:
    """Returns the metrics on held-out data; for a leaking model with and without the leak."""
    if found.causal is None:
        return TwoColumns(_quality(found, chance))
    return Group(
        Text("routing that looks at later tokens (impossible when decoding)", "bold red"),
        TwoColumns(_quality(found, chance)),
        Text("causal routing by the same scores", "bold"),
        TwoColumns(_quality(found.causal, chance)),
    )


def _quality(found: Evaluation, chance: float | None) -> list[tuple[str, str]]:
    spread = "" if found.standard_error is None else f" +- {1.96 * found.standard_error:.4f} (95%)"
    guessed = "" if chance is None else f"; guessing reaches {chance:.1%}"
    facts = [
        ("loss", f"{found.loss:.4f}{spread} nats per token, {found.tokens:,} tokens"),
        ("perplexity", f"{found.perplexity:,.2f}"),
        ("accuracy", f"{found.accuracy:.1%}{guessed}"),
    ]
    if found.bits_per_byte is not None:
        facts.insert(2, ("bits per byte", f"{found.bits_per_byte:.4f}"))
    return facts


def dial(points: Sequence[SweepPoint]) -> RenderableType:
    """Returns a table of the settings of a dial sweep, for each kind of routing."""
    from archdsl.evaluation.dial_sweep import LABELS

    parts: list[RenderableType] = []
    for routing in dict.fromkeys(point.routing for point in points):
        parts += [Text(LABELS[routing], "bold red" if routing == "leaking" else "bold")]
        parts += [_settings([point for point in points if point.routing == routing]), ""]
    exits = any(point.setting.exit is not None for point in points)
    routed = any(point.setting.capacity is not None for point in points) or not exits
    means = ["capacity of the routed steps in percent; 0 skips a step, 100 selects every token"]
    means = means * routed + ["exit: the threshold at which a token stops looping"] * exits
    legend = [
        ("setting", "; ".join(means)),
        ("FLOPs/token", "executed in the forward pass"),
        ("share", "of the tokens that take a routed step, or one after an exit, on average"),
        (
            "+-",
            "95% confidence interval; for the difference to the trained setting over pairs of "
            "windows",
        ),
    ]
    return Group(*parts, TwoColumns(legend))


def _settings(points: Sequence[SweepPoint]) -> StackingTable:
    bits = any(point.bits_per_byte is not None for point in points)
    titles = ["FLOPs/token", "share", "loss", *(["bits/byte"] if bits else []), "difference"]
    table = StackingTable("setting", *titles)
    for point in points:
        table.add_row(
            str(point.setting),
            short(point.flops_per_token),
            "-" if point.selected is None else f"{point.selected:.1%}",
            f"{point.loss:.4f}{_spread(point.standard_error)}",
            *([f"{point.bits_per_byte:.4f}"] if bits else []),
            ""
            if point.setting.trained
            else f"{point.difference:+.4f}{_spread(point.difference_error)}",
        )
    return table


def scores(runs: Sequence[tuple[DialSetting, TaskScores]]) -> RenderableType:
    """Returns a table of the scores in tasks of lm-evaluation-harness at each dial setting."""
    table = StackingTable("setting", "FLOPs/token", "task", "metric", "score", "examples")
    for setting, found in runs:
        head = str(setting), short(found.flops_per_token)
        for score in found.scores:
            value = "-" if score.value is None else _figure(score.value)
            table.add_row(
                *head,
                score.task,
                score.metric,
                f"{value}{_spread(score.standard_error)}",
                f"{score.examples:,}",
            )
            head = "", ""
    legend = [
        ("FLOPs/token", "executed in the forward pass, for the tokens read in the tasks"),
        ("+-", "95% confidence interval over examples"),
    ]
    return Group(table, "", TwoColumns(legend))


def _figure(value: float) -> str:
    """Formats a score; a perplexity may be very large."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _spread(error: float | None) -> str:
    return "" if error is None else f" +- {_figure(1.96 * error)}"
