"""Read prompts from a text file (one per line) or a .jsonl file (one JSON object per line)."""

from __future__ import annotations

import json
from pathlib import Path

from archdsl.errors import ArchdslError, describe
from archdsl.files import MISSING, read_bytes, why_unreadable

MAX_BYTES = 2**28


class PromptError(ArchdslError):
    """A file of prompts cannot be read, or does not have the expected format."""

    exit_status = 2


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file, or the ``prompt`` of each line of a .jsonl file.

    Raises PromptError if the file is missing, empty, too large, not UTF-8 or not of that format.
    """
    # str.splitlines would also split at characters that a JSON string may contain.
    lines = _read(path).removesuffix("\n").split("\n")
    if path.suffix == ".jsonl":
        return [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return [line.removesuffix("\r") for line in lines]


def _prompt(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{place}: this line is not a JSON object: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        if isinstance(value, dict) and "prompt" not in value:
            found = "an object without prompt"
        else:
            found = describe(value["prompt"] if isinstance(value, dict) else value)
        raise PromptError(f'{place}: expected an object such as {{"prompt": "..."}}, got {found}')
    return str(value["prompt"])


def _read(path: Path) -> str:
    if why := why_unreadable(path):
        found = "does not exist" if why == MISSING else why
        raise PromptError(
            f"{path} {found}; expected a text file with one prompt per line, or .jsonl"
        )
    content = read_bytes(path, PromptError, MAX_BYTES)
    if not content:
        raise PromptError(f"{path} is empty; expected one prompt per line, or .jsonl")
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> str:
    """Decode ``content`` as UTF-8. Raises PromptError, naming file and line, if it is not."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{name}:{line}: this is not UTF-8 text; save the file as UTF-8"
        ) from None
