"""Describe a model in a few words, for one row of a table."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.stack import StackSpec
from archdsl.lang.spec import BlockSpec, ModelSpec


def model_summary(spec: ModelSpec) -> str:
    """Return the blocks of a model in one line.

    For example: ``4x(layer + layer x4 prefix .7 thinking scale)``.
    """
    return _series(spec.blocks)


def _series(blocks: Iterable[BlockSpec]) -> str:
    return " + ".join(_times(text, count) for text, count in _groups(blocks))


def _groups(blocks: Iterable[BlockSpec]) -> list[tuple[str, int]]:
    """Return each group of equal adjacent blocks as its text and the number of blocks."""
    counted = [_counted(block) for block in blocks]
    return [
        (text, sum(count for _, count in same))
        for text, same in groupby(counted, key=lambda pair: pair[0])
    ]


def _counted(block: BlockSpec) -> tuple[str, int]:
    if not isinstance(block, StackSpec):
        return block_summary(block), 1
    groups = _groups(block.body)
    if len(groups) == 1:
        text, count = groups[0]
        return text, count * block.repeat
    return _series(block.body), block.repeat


def _times(text: str, count: int) -> str:
    if count == 1:
        return text
    return f"{count}x({text})" if " " in text else f"{count}x {text}"


def block_summary(block: BlockSpec) -> str:
    """Return one block in a few words.

    For example, ``layer x4 prefix .7/.5 thinking`` is a loop of 4 steps over a layer, with a
    ``prefix`` router of the capacities 0.7 and 0.5 and the residual ``thinking``.
    """
    if block.built_in_place:
        return block_summary(getattr(block, block.built_in_place))
    if isinstance(block, LoopSpec):
        return " ".join(_loop(block))
    if isinstance(block, StackSpec):
        return _series([block])
    return str(getattr(block, "kind", "block"))


def _loop(loop: LoopSpec) -> list[str]:
    said = [f"{block_summary(loop.body)} x{loop.steps}"]
    if loop.router is not None and any(row is not None for row in loop.rows()):
        used = loop.router.capacity[: max(1, loop.steps - loop.full_steps)]
        shares = [f"{share:g}".removeprefix("0") for share in used]
        shown = shares[:1] if len(set(shares)) == 1 else shares
        nested = " of all tokens nested" if loop.router.nested else ""
        said.append(f"{getattr(loop.router, 'kind', '')} {'/'.join(shown)}{nested}")
    said.append(str(getattr(loop.residual, "kind", "")))
    for part in (loop.parameters, loop.exit):
        if kind := getattr(part, "kind", None):
            said.append(str(kind))
    if loop.injection is not None:
        said.append(f"{loop.injection} injection")
    if loop.encoding is not None:
        said.append(str(getattr(loop.encoding, "kind", "")))
    if loop.kv != "own":
        said.append(f"{loop.kv} kv")
    return said
