"""Reads spec files into trees with positions, and applies inheritance and overrides.

``extends: other.yaml`` starts from another file and changes it key by key; ``set:
{blocks.0.repeat: 2}`` then changes single values in it. Neither key is part of the resulting value.
"""

from __future__ import annotations

import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from archdsl.errors import Position, Problem, SpecError, describe, did_you_mean
from archdsl.files import MISSING, why_unreadable
from archdsl.lang.yaml import (
    MAX_CHARS,
    MAX_DEPTH,
    MAX_PROBLEMS,
    Path,
    Tree,
    dotted,
    dump,
    dump_inline,
    parse,
)

__all__ = [
    "Path",
    "Tree",
    "at_position",
    "check_name",
    "dotted",
    "dump",
    "dump_inline",
    "from_value",
    "merge",
    "override",
    "parse",
    "put",
    "read",
    "read_file",
    "read_inside",
    "resolve",
    "shipped_specs",
    "subtree",
]

SPECS = pathlib.Path(__file__).parents[1] / "specs"
MAX_LEVELS = 16
MAX_NAME = 300
OVERLAY = "-overlay"  # the end of the name of a file that changes a trained model
FORMS = (
    "the path of a YAML file, the name of a shipped spec such as itt, a YAML text, a dict, or what "
    "archdsl.load returns"
)
TEXT = re.compile(r"\n|:\s")  # every YAML text of a spec has one, and hardly any file name
OPEN_VALUES = {"search", "fit"}
EXAMPLE = "blocks.0.repeat"
INDEX = re.compile("0|[1-9][0-9]{0,5}")


def shipped_specs() -> dict[str, pathlib.Path]:
    """Returns the files of the specs that come with archdsl, by their name without ``.yaml``."""
    return {name: file for name, file in _shipped().items() if not name.endswith(OVERLAY)}


def _shipped() -> dict[str, pathlib.Path]:
    """The shipped specs and also the overlays for ``archdsl retrofit``, by name."""
    return {file.stem: file for file in sorted(SPECS.glob("*.yaml"))}


def resolve(name: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the file of that name, or else the shipped spec of that name.

    A shipped spec may be written as ``itt``, ``itt.yaml`` or ``specs/itt.yaml``. Raises SpecError
    if there is neither.
    """
    return _find(pathlib.Path(name), pathlib.Path(name))


def _find(path: pathlib.Path, name: pathlib.Path) -> pathlib.Path:
    # A folder does not hide a shipped spec of the same name, such as the folder search/.
    if (reason := why_unreadable(path)) is None:
        return path
    shipped = _shipped()
    short = name.as_posix().removeprefix("specs/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short]
    inside = ("spec.yaml", "final/spec.yaml")  # of a checkpoint, and of a run
    if meant := [path / name for name in inside if (path / name).is_file()]:
        reason += f"; did you mean {meant[0] if meant[0].parent == path else meant[0].parent}?"
    if reason == MISSING:
        hint = did_you_mean(short, shipped)
        reason += f"{hint}; the specs that come with archdsl are {', '.join(shipped_specs())}"
    raise _fail(path, reason)


def _fail(path: pathlib.Path, message: str) -> SpecError:
    return SpecError(Problem("", message, Position(str(path)[:MAX_NAME], 0, 0)))


def read(spec: str | os.PathLike[str] | Mapping[str, Any]) -> Tree:
    """Reads a spec into a tree, with ``extends`` and ``set`` applied.

    ``spec`` is the path of a file, the name of a shipped spec, a YAML text or a mapping. A string
    with a line break, or with a colon and a space, is a text unless a file has that name. What a
    text or a mapping extends is looked for in the working directory. Raises SpecError.
    """
    if isinstance(spec, Mapping):
        return _whole(from_value(spec, "the given mapping"), pathlib.Path(), ())
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise _no_spec(spec)
    if isinstance(spec, str) and _is_text(spec):
        return _whole(_mapping(parse(spec, "<text>"), "a spec"), pathlib.Path(), ())
    return _read(resolve(spec), ())


def _no_spec(found: object) -> SpecError:
    return SpecError(Problem("", f"a spec is {FORMS}; got {reprlib.repr(found)}"))


def check_name(spec: str) -> None:
    """Raises SpecError if ``spec`` is a name, and no file and no shipped spec has it."""
    if not spec:
        raise _no_spec(spec)
    if not _is_text(spec):
        resolve(spec)


def read_file(path: str | os.PathLike[str], what: str) -> Tree:
    """Reads the mapping in a YAML file; ``extends`` is not followed. Raises SpecError.

    ``what`` the file is, such as "a spec", is named in the error of a file that holds no mapping.
    """
    file = pathlib.Path(path)
    if reason := why_unreadable(file):
        raise _fail(file, reason)
    return _mapping(parse(_text(file), str(file)), what)


def _is_text(spec: str) -> bool:
    return bool(TEXT.search(spec)) and why_unreadable(pathlib.Path(spec)) is not None


def _mapping(tree: Tree, what: str) -> Tree:
    if not isinstance(tree.value, dict):
        message = f"{what} is a mapping of keys to values, got {describe(tree.value)}"
        raise SpecError(Problem("", message, tree.position(())))
    return tree


def _read(file: pathlib.Path, below: tuple[pathlib.Path, ...]) -> Tree:
    tree = _mapping(parse(_text(file), str(file)), "a spec")
    return _whole(tree, file.parent, (*below, file))


def _whole(tree: Tree, folder: pathlib.Path, files: tuple[pathlib.Path, ...]) -> Tree:
    """Returns the tree with ``extends`` and ``set`` applied.

    ``folder``: where the extended file is looked for. ``files``: those read so far, the one that
    holds this tree last.
    """
    own = _without(tree, "extends", "set")
    if "extends" in tree.value:
        own = merge(_read(_base(tree, folder, files), files), own)
    if "set" in tree.value:
        own = _apply(own, _entries(tree))
    return own


def _text(file: pathlib.Path) -> str:
    try:
        with open(file, "rb", opener=_open) as stream:
            data = stream.read(MAX_CHARS + 1)
    except OSError as error:
        raise _fail(file, f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_CHARS:
        raise _fail(file, f"is larger than {MAX_CHARS >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        position = Position(str(file), before.count("\n") + 1, len(before) - before.rfind("\n"))
        message = f"not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        raise SpecError(Problem("", message, position)) from None


def _open(path: str, flags: int) -> int:
    # O_NONBLOCK: this returns at once even if a pipe has replaced the file in the meantime
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _base(tree: Tree, folder: pathlib.Path, files: tuple[pathlib.Path, ...]) -> pathlib.Path:
    """Returns the file that a tree extends. ``files``: those read so far, the tree's own last."""

    def fail(message: str) -> SpecError:
        return SpecError(Problem("extends", message, tree.position(("extends",))))

    name = tree.value["extends"]
    if not isinstance(name, str):
        raise fail(f"must be the name of one spec file, got {describe(name)}")
    try:
        base = _find(folder / name, pathlib.Path(name))
    except SpecError as error:
        raise fail(f"{name}: {error.problems[0].message}") from None
    if any(base.samefile(other) for other in files):
        chain = " -> ".join(str(other) for other in (*files, base))
        raise fail(f"is circular: {chain}")
    if len(files) > MAX_LEVELS:
        raise fail(f"is nested more than {MAX_LEVELS} files deep")
    return base


def _without(tree: Tree, *keys: str) -> Tree:
    value = {key: item for key, item in tree.value.items() if key not in keys}
    positions = {
        path: position
        for path, position in tree.positions.items()
        if not path or path[0] not in keys
    }
    return Tree(value, positions)


def _entries(tree: Tree) -> list[tuple[str, Tree]]:
    """The entries of ``set``: the dotted path and the new value with its positions."""
    wanted = tree.value["set"]
    if not isinstance(wanted, dict):
        message = f"must map paths to values, as in {{{EXAMPLE}: 2}}; got {describe(wanted)}"
        raise SpecError(Problem("set", message, tree.position(("set",))))
    return [(key, subtree(tree, ("set", key), value)) for key, value in wanted.items()]


def subtree(tree: Tree, path: Path, value: Any) -> Tree:
    """Returns the tree of ``value``, which is at ``path`` in a tree."""
    whole = {place: tree.positions.get((*path, *place)) for place in _paths(value)}
    return Tree(value, {place: position for place, position in whole.items() if position})


def read_inside(tree: Tree, key: str, folder: pathlib.Path) -> Tree:
    """Returns the spec that is written or named at ``key``, with ``extends`` and ``set`` applied.

    A file is looked for in ``folder`` first, then in the working directory, and then among the
    shipped specs. Raises SpecError.
    """
    value, at = tree.value[key], tree.position((key,))
    if isinstance(value, Mapping):
        return _whole(subtree(tree, (key,), value), folder, ())
    if not isinstance(value, str) or not value:
        message = f"must be a spec, or the name of one, got {describe(value)}"
        raise SpecError(Problem(key, message, at))
    beside = folder / value
    try:
        return _read(beside if beside.is_file() else resolve(value), ())
    except SpecError as error:
        named = [p for p in error.problems if p.position is None or p.position.line]
        if named:
            raise
        raise SpecError(Problem(key, f"{value}: {error.problems[0].message}", at)) from None


def from_value(value: Any, file: str) -> Tree:
    """Turns a plain Python value into a tree. Its positions name ``file`` without a line."""
    return at_position(value, Position(file, 0, 0))


def at_position(value: Any, position: Position | None) -> Tree:
    """Turns a plain Python value into a tree whose parts all have the same position."""
    plain = _plain(value)
    return Tree(plain, dict.fromkeys(_paths(plain), position) if position else {})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for part, item in enumerate(value) if isinstance(value, list) else items:
        yield from _paths(item, (*path, part))


def override(tree: Tree, assignments: Sequence[str]) -> Tree:
    """Applies assignments such as ``blocks.0.repeat=2`` to a tree, one after the other.

    Raises SpecError with the problems of all assignments.
    """
    entries: list[tuple[str, Tree]] = []
    problems: list[Problem] = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        whole = Position(f"--set {assignment}", 0, 0)
        if not equals or not text.strip():
            problems.append(Problem("", f"must be path=value, as in {EXAMPLE}=2", whole))
            continue
        try:
            value = parse(text, whole.file).value
            entries.append((path.strip(), from_value(value, whole.file)))
        except SpecError as error:
            problems += [replace(problem, position=whole) for problem in error.problems]
    return _apply(tree, entries, problems)


def _apply(tree: Tree, entries: list[tuple[str, Tree]], problems: Iterable[Problem] = ()) -> Tree:
    # The tree is copied once and then changed in place, as there may be very many entries.
    changed, found = Tree(_plain(tree.value), dict(tree.positions)), list(problems)
    for words, new in entries:
        try:
            _assign(changed, _locate(changed.value, words.split(".")), new)
        except ValueError as error:
            found.append(Problem(words, str(error), new.position(())))
        if len(found) > MAX_PROBLEMS:
            break
    if found:
        raise SpecError(found)
    return changed


def _locate(value: Any, words: list[str]) -> Path:
    """Returns the path that the words of a dotted path refer to in ``value``.

    Only the last word may be a new key. Raises ValueError if there is no such path.
    """
    path: Path = ()
    for i, word in enumerate(words):
        here = dotted(path) or "the spec"
        if isinstance(value, list):
            if not INDEX.fullmatch(word) or int(word) >= len(value):
                raise ValueError(f"{here} is a list of {len(value)} and has no item {word!r}")
            path, value = (*path, int(word)), value[int(word)]
        elif isinstance(value, dict) and word:
            if word not in value and i < len(words) - 1:
                raise ValueError(f"{here} has no key {word!r}{did_you_mean(word, value)}")
            path, value = (*path, word), value.get(word)
        else:
            raise ValueError(f"{here} is {describe(value)}, it has no key {word!r}")
    return path


def put(tree: Tree, path: Path, new: Tree) -> Tree:
    """Returns the tree with ``new`` at ``path``; all but the last part of the path must exist.

    Raises ValueError if the result is nested more than MAX_DEPTH levels deep.
    """
    if not path:
        return new
    changed = Tree(_plain(tree.value), dict(tree.positions))
    _assign(changed, path, new)
    return changed


def _assign(tree: Tree, path: Path, new: Tree) -> None:
    """Does the same as `put`, but changes the tree itself."""
    if len(path) + max(map(len, new.positions), default=0) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    *parents, last = path
    parent: Any = tree.value
    for part in parents:
        parent = parent[part]
    if not isinstance(parent, dict) or last in parent:
        for place in _paths(parent[last], path):
            tree.positions.pop(place, None)
    parent[last] = new.value
    tree.positions.update({(*path, *place): position for place, position in new.positions.items()})


def merge(base: Tree, patch: Tree) -> Tree:
    """Returns ``base`` changed by ``patch``.

    Mappings are merged key by key; everything else is replaced. A mapping is also replaced as a
    whole if its ``kind`` changes, or if either side is an open value (``search`` or ``fit``).
    """
    value = _merge(base.value, patch.value)
    # where both have a position, the value in the result is the one of patch
    known = base.positions | patch.positions
    return Tree(value, {path: known[path] for path in _paths(value) if path in known})


def _merge(base: Any, patch: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return patch
    other_kind = "kind" in base and "kind" in patch and base["kind"] != patch["kind"]
    if other_kind or not OPEN_VALUES.isdisjoint(base) or not OPEN_VALUES.isdisjoint(patch):
        return patch
    return base | {
        key: _merge(base[key], item) if key in base else item for key, item in patch.items()
    }
