"""Prompts from a file: one per line, or JSON objects that have one."""

from __future__ import annotations

import json
from pathlib import Path

from archdsl.errors import ArchdslError, describe

MAX_BYTES = 2**28


class PromptError(ArchdslError):
    """A file that holds no prompts, or not as it should."""

    exit_status = 2


def read_prompts(path: Path) -> list[str]:
    """The lines of a text, or what a .jsonl has as ``prompt`` in each; raises PromptError."""
    # not splitlines, which also cuts at letters that JSON may contain
    lines = _read(path).removesuffix("\n").split("\n")
    if path.suffix == ".jsonl":
        return [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return [line.removesuffix("\r") for line in lines]


def _prompt(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{place}: not a JSON object: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        found = describe(value.get("prompt") if isinstance(value, dict) else value)
        raise PromptError(f'{place}: expected an object such as {{"prompt": "..."}}, got {found}')
    return str(value["prompt"])


def _read(path: Path) -> str:
    if not path.is_file():
        raise PromptError(f"{path}: no such file; expected one prompt per line, or a .jsonl")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise PromptError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
    if not content:
        raise PromptError(f"{path} is empty; expected one prompt per line, or a .jsonl")
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> str:
    """The text that ``content`` is; raises PromptError if it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{name}:{line}: not UTF-8 text; save it as UTF-8") from None
