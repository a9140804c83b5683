"""Reports as plain text and as HTML, for the Python prompt and for notebooks."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from archdsl.costs.receipt import Receipt
from archdsl.costs.receipt import cost as count
from archdsl.lang.load import Source, as_spec
from archdsl.reports import tables

if TYPE_CHECKING:
    from rich.console import RenderableType

    from archdsl.lang.spec import ModelSpec

WIDTH = 100  # characters of a line in a notebook
HTML = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.3">{code}</pre>'


def as_text(*parts: RenderableType) -> str:
    """Returns what the command line prints for these parts, without styles."""
    stream = io.StringIO()
    console = Console(file=stream, color_system=None, highlight=False, emoji=False, markup=False)
    console.print(*parts, sep="\n")
    return stream.getvalue().rstrip("\n")


def as_html(*parts: RenderableType) -> str:
    """Returns an HTML element with what the command line prints for these parts.

    All text is escaped, so that names and descriptions from a file cannot add elements.
    """
    console = Console(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        highlight=False,
        emoji=False,
        markup=False,
    )
    console.print(*parts, sep="\n")
    return console.export_html(code_format=HTML, inline_styles=True)


class ShownReceipt(Receipt):
    """A receipt that a Python prompt or a notebook shows as ``archdsl build`` prints it."""

    spec: ModelSpec

    def __str__(self) -> str:
        return as_text(tables.receipt(self.spec, "node", self.spec.budget))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(tables.receipt(self.spec, "node", self.spec.budget))


def cost(spec: Source) -> ShownReceipt:
    """Returns what a model costs: parameters, FLOPs, KV cache and memory, without building it.

    ``spec``: a spec, or anything that `archdsl.load` takes. Raises SpecError if it is wrong. The
    result is a named tuple, which prints as the receipt that ``archdsl build`` prints.

    >>> import archdsl
    >>> receipt = archdsl.cost("transformer")
    >>> f"{receipt.matrices / 1e6:.1f}M"
    '162.0M'
    """
    model = as_spec(spec)
    receipt = ShownReceipt(*count(model))
    receipt.spec = model
    return receipt
