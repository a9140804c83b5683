"""What a shell completes: specs, checkpoints, studies and kinds.

Each function takes what was typed so far and returns what it can become. A key press waits for the
answer, so these functions import neither torch nor optuna, and look at a bounded number of files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import archdsl

Completer = Callable[[str], list[str]]

MOST = 200  # files that are looked at, in each place
LARGEST = 2**20  # bytes of a settings.json that are read
RUNS = "runs"  # where commands write unless told otherwise


def specs(incomplete: str) -> list[str]:
    """Return the names of the shipped specs, and the YAML files in the folder that was typed."""
    return _shipped_and_files(incomplete, overlays=False)


def overlays(incomplete: str) -> list[str]:
    """Return the shipped overlays of ``retrofit``, and the YAML files in the folder typed."""
    return _shipped_and_files(incomplete, overlays=True)


def _shipped_and_files(incomplete: str, overlays: bool) -> list[str]:
    shipped = (file.stem for file in (Path(archdsl.__file__).parent / "specs").glob("*.yaml"))
    asked = [name for name in shipped if name.endswith("-overlay") == overlays]
    lead, folder = _typed(incomplete)
    return _matching(incomplete, [*asked, *(f"{lead}{file.name}" for file in _yaml(folder))])


def _yaml(folder: Path) -> Iterator[Path]:
    return (file for file in _inside(folder, "*") if file.suffix in (".yaml", ".yml"))


def checkpoints(incomplete: str) -> list[str]:
    """Return the folders of checkpoints in ``runs`` and in the folder that was typed."""
    found = [
        f"{lead}{file.parent.relative_to(folder)}"
        for lead, folder in ((f"{RUNS}/", Path(RUNS)), _typed(incomplete))
        for pattern in ("*", "*/final", "*/checkpoints/step-*")
        for file in _inside(folder, f"{pattern}/provenance.json")
    ]
    return _matching(incomplete, found)


def specs_and_checkpoints(incomplete: str) -> list[str]:
    """Return the completions of `specs` and of `checkpoints`."""
    return [*specs(incomplete), *checkpoints(incomplete)]


def studies(incomplete: str) -> list[str]:
    """Return the names of the studies in ``runs`` and of their folders."""
    found: list[str] = []
    for file in _inside(Path(RUNS), "*/settings.json"):
        folder = file.parent
        if (folder / "study.journal").exists():
            names = [_name_of_study(file), folder.name]
            found += [str(folder)] if "/" in incomplete else filter(None, names)
    return _matching(incomplete, found)


def _name_of_study(file: Path) -> str:
    """Return the name in a settings.json; empty if the file is no such file."""
    try:
        with file.open(encoding="utf-8") as text:
            found = json.loads(text.read(LARGEST))
    except (OSError, ValueError, RecursionError):
        return ""
    name = found.get("name") if isinstance(found, dict) else None
    return name if isinstance(name, str) else ""


def kinds(incomplete: str) -> list[str]:
    """Return the kinds, the families of kinds, and the keys at the top of a spec."""
    from archdsl.errors import ArchdslError
    from archdsl.lang.registry import families
    from archdsl.lang.spec import ModelSpec

    try:
        found = families()
    except ArchdslError:  # a plugin that cannot be loaded: the command will say so
        return []
    known = (kind for of_family in found.values() for kind in of_family)
    return _matching(incomplete, [*known, *found, "spec", *ModelSpec.model_fields])


def words(*known: str) -> Completer:
    """Return a completer of these words."""
    return lambda incomplete: _matching(incomplete, known)


def _typed(incomplete: str) -> tuple[str, Path]:
    """Return the folder that was typed, as it was typed with its slash and as a path."""
    lead = incomplete[: incomplete.rfind("/") + 1]
    return lead, Path(lead or ".")


def _inside(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield some of the files that match; none if the folder cannot be read."""
    try:
        yield from islice((path for path in folder.glob(pattern) if path.is_file()), MOST)
    except OSError:
        return


def _matching(incomplete: str, found: Iterable[str]) -> list[str]:
    return sorted({one for one in found if one.startswith(incomplete)})
