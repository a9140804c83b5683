"""The report's pictures as files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from archdsl.search.report.png import _front, plot
from tests.search.results import made_up

WRITTEN_BEFORE = Path(__file__).parents[2] / "written_before" / "study"


def size(file: Path) -> tuple[int, int]:
    """Width and height that a PNG's header says."""
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_each_picture_is_drawn_whatever_names_hold(tmp_path: Path) -> None:
    result = made_up(12) | {"objective": r"text + $\frac{$"}  # what mathematics is not
    drawn = plot(result, tmp_path)
    names = ["front.png", "curves.png", "importance.png", "spent.png", "health.png"]
    assert [path.name for path in drawn] == names
    assert all(min(size(path)) > 150 and path.stat().st_size > 5000 for path in drawn)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_what_there_is_nothing_of_is_left_out(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"entries": [], "importance": {}}
    drawn = plot(made_up(12) | nothing, tmp_path)
    assert [path.name for path in drawn] == ["front.png", "curves.png", "spent.png"]


def test_baselines_of_an_earlier_version_are_drawn(tmp_path: Path) -> None:
    old = json.loads((WRITTEN_BEFORE / "result.json").read_text())
    figure = Figure()
    _front(old, figure)
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert "baselines" in labels
    assert [path.name for path in plot(old, tmp_path)][:2] == ["front.png", "curves.png"]
