"""Write the generated pages of the site: the commands, the kinds and the JSON schema.

MkDocs calls `on_files` once per build (`hooks` in mkdocs.yml). The pages exist only in the site, so
that they can never differ from the code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from archdsl.cli.app import app


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "reference/commands.md": commands(),
        "reference/kinds.md": kinds(),
        "reference/archdsl.schema.json": printed("schema"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def commands() -> str:
    """The help of every command and of every subcommand, one section each."""
    parts = ["# Commands", "", "This page is generated from `archdsl COMMAND --help`.", ""]
    for words in [(), *walk()]:
        shown = fenced("text", printed(*words, "--help"))
        parts += [f"## {' '.join(('archdsl', *words))}", "", shown, ""]
    return "\n".join(parts)


def walk(*words: str) -> Iterator[tuple[str, ...]]:
    """The words of each command below this one, with its own subcommands after it."""
    listed = printed(*words, "--help").partition("Commands:\n")[2]
    for name in re.findall(r"^  (\w+)", listed, re.MULTILINE):
        yield (*words, name)
        yield from walk(*words, name)


def printed(*words: str) -> str:
    """What the command line prints."""
    os.environ["COLUMNS"] = "92"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app(list(words), prog_name="archdsl")
    return out.getvalue().strip()


def kinds() -> str:
    """Every kind of every family: what it is, its fields and an example."""
    parts = ["# Kinds of parts", "", "This page is generated from `archdsl blocks`."]
    family = ""
    for entry in json.loads(printed("blocks", "--json")):
        if entry["family"] != family:
            family = entry["family"]
            parts += ["", f"## {family}"]
        parts += ["", f"### {entry['kind']}", "", entry["sentence"], ""]
        if entry["fields"]:
            parts += ["| field | type | default | meaning |", "|---|---|---|---|"]
            parts += [*map(row, entry["fields"]), ""]
        parts.append(fenced("yaml", entry["example"]))
    return "\n".join(parts)


def row(field: dict[str, str | None]) -> str:
    default = "required" if field["default"] is None else f"`{field['default']}`"
    cells = [f"`{field['name']}`", field["type"], default, field["description"]]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
