"""A block in a few words, for a column of a table."""

from __future__ import annotations

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.stack import StackSpec
from archdsl.spec import BlockSpec


def words(block: BlockSpec) -> str:
    """``2x(layer + loop x4 prefix .7/.5)``."""
    match block:
        case StackSpec():
            inner = " + ".join(words(part) for part in block.body)
            return f"{block.repeat}x({inner})" if block.repeat > 1 else inner
        case LoopSpec() if not block.is_body:
            return " ".join(_loop(block))
        case LoopSpec():
            return words(block.body)
        case _:
            return str(getattr(block, "kind", "block"))


def _loop(loop: LoopSpec) -> list[str]:
    said = [f"{words(loop.body)} x{loop.steps}"]
    if loop.router is not None:
        used = loop.router.capacity[: max(1, loop.steps - loop.full_steps)]
        shares = "/".join(f"{share:g}".removeprefix("0") for share in used)
        said.append(f"{getattr(loop.router, 'kind', '')} {shares}")
    said.append(str(getattr(loop.residual, "kind", "")))
    if loop.encoding is not None:
        said.append(str(getattr(loop.encoding, "kind", "")))
    if loop.kv == "shared":
        said.append("shared kv")
    return said
