"""The HTML report: one file with the result, its plots and every spec."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from archdsl.files import write_text
from archdsl.search.analysis.noise import MOSTLY

SCRIPTS = (
    *("tools", "plots", "front", "curves", "parallel", "result", "price", "trials", "panel"),
    "start",  # calls the others
)


def write_page(result: dict[str, Any], path: Path) -> None:
    """Write ``page(result)`` to a file of about 5 MB."""
    write_text(path, page(result))


def page(result: dict[str, Any]) -> str:
    """Return the HTML report of a result, which has the content of result.json.

    The page loads nothing from the network, and its content security policy forbids it. Without
    plotly (the extra ``plots``) the page has all tables, and says how to get the plots.
    """
    scripts = ["".join(asset(f"{name}.js") for name in SCRIPTS), *_plotly()]
    return Template(asset("page.html")).substitute(
        name=escape(result["name"]),
        conclusion=escape(result["verdict"]),
        notes="\n".join(_notes(result)),
        validation=escape(result["trust_sentence"]),
        style=asset("page.css"),
        policy=_policy(scripts),
        data=json.dumps(_finite(result), separators=(",", ":")).replace("<", "\\u003c"),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _notes(result: dict[str, Any]) -> Iterator[str]:
    """Yield what the winner costs and what is noise; results of earlier versions say neither."""
    if costs := result.get("costs_sentence"):
        yield f'<p class="costs">{escape(costs)}</p>'
    if noisy := (result.get("noise") or {}).get("sentence"):
        kind = "note" if result["noise"]["share"] >= MOSTLY else "validation"
        yield f'<p class="{kind}">{escape(noisy)}</p>'


def asset(name: str) -> str:
    """Return the text of a file of the pages of reports."""
    return files("archdsl.search.report").joinpath("assets", name).read_text(encoding="utf-8")


def _plotly() -> list[str]:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return []
    return [get_plotlyjs()]


def _policy(scripts: list[str]) -> str:
    """Return a content security policy that runs only these scripts, whatever the result holds."""
    hashes = (b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _finite(value: Any) -> Any:
    """Replace infinity (the loss of a diverged training), which JSON does not have, by None."""
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
