"""Small texts to load, and functions that decode the loaded tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from archdsl.data.documents import SPLITS
from archdsl.data.loading import TextData, load_data

END = 256
WORDS = ["loop", "think", "depth", "token", "na\u00efve", "\U0001f600", "\n", "</s>"]


def document(seed: int, words: int = 30) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words)) + f" {seed}"


def documents(tokens: Any) -> list[str]:
    """Returns the documents of a sequence of byte tokens."""
    # the byte 255 is in no UTF-8
    *ended, rest = np.where(tokens == END, 255, tokens).astype(np.uint8).tobytes().split(b"\xff")
    assert not rest
    return [text.decode() for text in ended[1:]]


def text_of(data: TextData) -> str:
    return "".join(text for split in SPLITS for text in documents(data.tokens[split]))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "number": i}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_corpus(folder: Path) -> Path:
    return write_jsonl(folder / "corpus.jsonl", [document(seed) for seed in range(60)])


def load_text(source: Path | str | None, cache: Path, tokenizer: str = "bytes") -> TextData:
    data = load_data(None if source is None else str(source), tokenizer=tokenizer, cache=cache)
    assert isinstance(data, TextData)
    return data
