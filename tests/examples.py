"""Examples of evaluation tasks, with the same fields as on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks

SHIPPED = Path(lm_eval.tasks.__file__).parent  # reading all of them takes ten seconds

Rows = list[dict[str, Any]]

ARC_EASY: Rows = [
    {
        "id": f"Mercury_{i}",
        "question": f"Which of these is number {i}?",
        "choices": {"text": ["a stone", f"the {i}", "a naïve idea", "rain"], "label": [*"ABCD"]},
        "answerKey": "ABCD"[i % 4],
    }
    for i in range(8)
]
PIQA: Rows = [
    {"goal": f"Open {i} doors", "sol1": "Push.", "sol2": "Wait for the rain.", "label": i % 2}
    for i in range(6)
]
GSM8K: Rows = [
    {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1>>.\n#### {i + 1}"} for i in range(9)
]
LAMBADA: Rows = [{"text": f"She opened {i} doors and then the window"} for i in range(4)]


def write_rows(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_examples(folder: Path) -> Path:
    """Returns examples of four tasks; one of them has the name of its dataset."""
    write_rows(folder / "arc_easy" / "test.jsonl", ARC_EASY)
    write_rows(folder / "baber" / "piqa" / "validation.jsonl", PIQA)
    write_rows(folder / "gsm8k" / "test.jsonl", GSM8K[:2])
    write_rows(folder / "gsm8k" / "train.jsonl", GSM8K[2:])
    write_rows(folder / "lambada_openai" / "test.jsonl", LAMBADA)
    return folder
