"""The compute dial: which passes a loop runs, and the share of tokens that takes each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from archdsl.nn.loop import DialError, Pass, Step

if TYPE_CHECKING:
    from archdsl.blocks.exit import ExitSpec
    from archdsl.blocks.loop import LoopSpec

Capacity = Sequence[float] | float | None


def plan(
    spec: LoopSpec,
    rows: list[int | None],
    label: str,
    capacity: Capacity,
    steps: int | None,
    threshold: float | None = None,
    place: str = "",
) -> list[Pass]:
    """The passes of a loop at a setting of the compute dial; None: as trained.

    ``rows``: for each trained step the row of the router's weights; None: it takes every token.
    ``label``: the name of the loop; ``place``: the end of it, see `Loop`. ``threshold``: of its
    exit. Raises DialError if the loop cannot be run so.
    """
    count = spec.steps if steps is None else steps
    if count < 1:
        raise DialError(f"{label}: needs at least one step, got {count}")
    if count > spec.steps and spec.parameters == "per_step":
        raise DialError(f"{label}: has weights for {spec.steps} steps, each its own; got {count}")
    if spec.leaves is not None:
        return _until_exit(spec, spec.leaves, label, count, threshold, place)
    likes = [min(step, spec.steps - 1) for step in range(count)]
    shares = _shares(spec, [rows[like] for like in likes], label, capacity)
    passes: list[Pass] = []
    among, routed = 1.0, 0
    for step, (like, share) in enumerate(zip(likes, shares, strict=True)):
        row, at = rows[like], None
        if row is not None:
            at = Step(f"{label}.{routed}", row, share, among, f"{place}.{routed}")
            routed += 1
            if spec.router is not None and spec.router.nested:
                among = share
        passes.append(Pass(step, like, at))
    return passes


def _until_exit(
    spec: LoopSpec, leaves: ExitSpec, label: str, count: int, threshold: float | None, place: str
) -> list[Pass]:
    """The passes of a loop whose tokens may stop after each of them."""
    threshold = leaves.threshold if threshold is None else threshold
    if not 0 <= threshold <= leaves.most:
        raise DialError(
            f"{label}: the threshold of its exit is between 0 and {leaves.most:g}, "
            f"got {threshold:g}"
        )
    stops = leaves.stops_at(threshold)
    given = leaves.remaining
    passes = [Pass(0, 0, None, exit=threshold)]
    for step in range(1, count):
        share = given[min(step - 1, len(given) - 1)]
        number = step - 1
        at = Step(f"{label}.{number}", number, share, 1.0, f"{place}.{number}") if stops else None
        passes.append(Pass(step, min(step, spec.steps - 1), at, exit=threshold))
    return passes


def _shares(spec: LoopSpec, rows: list[int | None], label: str, capacity: Capacity) -> list[float]:
    """The share of all tokens that each pass may take."""
    further = max(0, len(rows) - spec.full_steps)
    full = [1.0] * (len(rows) - further)
    if spec.router is None or not further:
        return full + [1.0] * further
    learned = [row is not None for row in rows[spec.full_steps :]]
    if capacity is None:
        given = spec.router.capacity
        return full + [given[min(i, len(given) - 1)] for i in range(further)]
    if isinstance(capacity, float | int):
        shares = [capacity if has else 1.0 for has in learned]
    else:
        shares = list(capacity)
    _check(shares, learned, spec.router.nested, label)
    return full + shares


def _check(shares: list[float], learned: list[bool], nested: bool, label: str) -> None:
    if len(shares) != len(learned):
        raise DialError(
            f"{label}: {len(learned)} passes are routed, so one capacity or {len(learned)} "
            f"are needed; got {len(shares)}"
        )
    for i, (share, has) in enumerate(zip(shares, learned, strict=True)):
        if not 0 <= share <= 1:
            raise DialError(f"{label}: a capacity is between 0 and 1, got {share:g}")
        if share < 1 and not has:
            raise DialError(
                f"{label}: routed pass {i + 1} was trained on every token and has no router, "
                f"so its capacity is 1; got {share:g}"
            )
    if nested and shares != sorted(shares, reverse=True):
        raise DialError(f"{label}: is nested, so capacities must not rise; got {shares}")
