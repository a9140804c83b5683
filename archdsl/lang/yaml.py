"""Parses YAML 1.2 text into a tree with positions, and writes values as YAML.

Scalars follow the core schema (yaml.org/spec/1.2.2, 10.3): ``1e-3`` is a number, ``on`` is text,
``010`` is ten. Tags, merge keys, duplicate keys and numbers that are not finite are errors.
Only the event stream of libyaml is used, so that a hostile file is refused before it takes memory.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from archdsl.errors import Position, Problem, SpecError

Path = tuple[str | int, ...]

MAX_CHARS = 2**20
MAX_NODES = 30_000  # with every alias expanded
MAX_DEPTH = 100
MAX_DIGITS = 100
MAX_KEY = 200
MAX_PROBLEMS = 100
MAX_COLUMNS = 100

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is about 20 times faster

# The characters that YAML does not count as printable, the line breaks that editors do not count,
# and byte order marks.
NOT_PRINTABLE = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff"
REFUSED = re.compile(f"[{NOT_PRINTABLE}]")
ESCAPED = re.compile(rf'["\\\t\n\r{NOT_PRINTABLE}]')
NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
PLAIN = re.compile(r"\w[\w./+%-]*( [\w./+%-]+)*")  # text that never needs quotes


@dataclass(frozen=True)
class Tree:
    """A value of plain dicts, lists and scalars, and the position in the text for each path."""

    value: Any
    positions: dict[Path, Position]

    def position(self, path: Path) -> Position | None:
        """Returns the position of the value at ``path``, or of the nearest value that contains it.

        Returns None if there is no such position.
        """
        while path and path not in self.positions:
            path = path[:-1]
        return self.positions.get(path)


def dotted(path: Path) -> str:
    """Joins the parts of a path with dots, as in ``blocks.0.steps``."""
    return ".".join(str(part) for part in path)


def parse(text: str, file: str = "<string>") -> Tree:
    """Parses ``text``, which holds one YAML document. ``file`` is its name in error messages.

    Raises SpecError with all problems of the text.
    """
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_CHARS:
        raise SpecError(Problem("", f"is larger than {MAX_CHARS >> 20} MiB", Position(file, 0, 0)))
    if found := REFUSED.search(text):
        line = text.count("\n", 0, found.start()) + 1
        position = Position(file, line, found.start() - text.rfind("\n", 0, found.start()))
        raise SpecError(Problem("", f"character {found[0]!a} is not allowed", position))
    composer = _Composer(text, file)
    try:
        node = composer.document()
    except yaml.MarkedYAMLError as error:
        composer.fail((), composer.position_of(error.problem_mark), _syntax(error))
    if composer.problems:
        raise SpecError(composer.problems)
    positions: dict[Path, Position] = {}
    return Tree(_plain(node, (), positions), positions)


def scalar(text: str) -> Any:
    """Returns the value of an unquoted scalar. Raises ValueError for a number that is not finite.

    Also raises ValueError for a number of more than MAX_DIGITS characters.
    """
    if NULL.fullmatch(text):
        return None
    if found := BOOL.fullmatch(text):
        return found[1] is not None
    if NOT_FINITE.fullmatch(text):
        raise ValueError(f"number {text} is not finite; quote it if it is text")
    integer = INT.fullmatch(text)
    if not integer and not FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number may have {MAX_DIGITS} characters, got one of {len(text)}")
    if integer:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if abs(number := float(text)) == float("inf"):
        raise ValueError(f"number {text} is too large")
    return number


@dataclass(frozen=True)
class _Node:
    """A parsed value. ``size``: values in it, itself included; ``height``: levels below it."""

    value: Any  # a scalar, list[_Node] or dict[str, _Node]
    position: Position
    size: int = 1
    height: int = 0


class _Composer:
    """Composes nodes from events. It counts nodes as if every alias were expanded, and so refuses
    small files that would expand to very large values."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.events: Iterator[Any] = yaml.parse(text, Loader=LOADER)
        self.anchors: dict[str, _Node | None] = {}  # None while the anchored value is being read
        self.problems: list[Problem] = []
        self.nodes = 0

    def position_of(self, mark: Any) -> Position:
        """Converts a mark of PyYAML, which counts from zero."""
        return Position(self.file, mark.line + 1, mark.column + 1)

    def add_problem(self, path: Path, position: Position, message: str) -> None:
        """Adds a problem. Raises SpecError if there are more than MAX_PROBLEMS."""
        if len(self.problems) == MAX_PROBLEMS:
            self.fail(path, position, f"more than {MAX_PROBLEMS} problems; reading stopped here")
        self.problems.append(Problem(dotted(path), message, position))

    def fail(self, path: Path, position: Position, message: str) -> NoReturn:
        """Raises SpecError with this problem and all problems so far."""
        raise SpecError([*self.problems, Problem(dotted(path), message, position)])

    def document(self) -> _Node:
        """Reads the whole text. Raises SpecError if there is not exactly one document."""
        next(self.events)  # start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            self.fail((), Position(self.file, 0, 0), "is empty")
        node = self.node(next(self.events), ())
        next(self.events)  # end of the document
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            self.fail(
                (), self.position_of(event.start_mark), "second document; a file may hold only one"
            )
        return node

    def node(self, event: Any, path: Path) -> _Node:
        """Reads the value that begins with ``event``."""
        position = self.position_of(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), path, position)
        self.count(1, 0, path, position)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.add_problem(
                path,
                position,
                f"tag {reprlib.repr(tag)} is not allowed; quote the value if it is text",
            )
        if event.anchor:
            self.anchors[event.anchor] = None
        node = self.content(event, path, position)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def count(self, size: int, height: int, path: Path, position: Position) -> None:
        """Adds to the number of values. Raises SpecError if there are too many, or too deep."""
        self.nodes += size
        if self.nodes > MAX_NODES:
            self.fail((), position, f"more than {MAX_NODES} values with all aliases expanded")
        if len(path) + height > MAX_DEPTH:
            self.fail((), position, f"nested more than {MAX_DEPTH} levels deep")

    def alias(self, name: str, path: Path, position: Position) -> _Node:
        """Returns the value that an alias refers to."""
        node = self.anchors.get(name)
        if node is None:
            known = "is inside the value it refers to" if name in self.anchors else "is not defined"
            self.fail(path, position, f"alias *{name[:50]} {known}")
        self.count(node.size, node.height, path, position)
        return _Node(node.value, position, node.size, node.height)

    def content(self, event: Any, path: Path, position: Position) -> _Node:
        """Reads a scalar, a list or a mapping."""
        if isinstance(event, yaml.ScalarEvent):
            return _Node(self.scalar(event, path, position), position)
        listing = isinstance(event, yaml.SequenceStartEvent)
        value = self.sequence(path) if listing else self.mapping(path)
        nodes = value if isinstance(value, list) else list(value.values())
        height = 1 + max((node.height for node in nodes), default=-1)
        return _Node(value, position, 1 + sum(node.size for node in nodes), height)

    def scalar(self, event: Any, path: Path, position: Position) -> Any:
        """Returns the value of a scalar; quoted ones are always text."""
        if not event.implicit[0]:
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self.add_problem(path, position, str(error))
            return None

    def sequence(self, path: Path) -> list[_Node]:
        """Reads the items of a list."""
        nodes: list[_Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            nodes.append(self.node(event, (*path, len(nodes))))
        return nodes

    def mapping(self, path: Path) -> dict[str, _Node]:
        """Reads the keys and values of a mapping; a key that is given twice is a problem."""
        nodes: dict[str, _Node] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key, position = self.key(event, path), self.position_of(event.start_mark)
            node = self.node(next(self.events), (*path, key))
            if first := lines.get(key):
                self.add_problem(
                    (*path, key), position, f"key {key!r} was already given on line {first}"
                )
            lines[key], nodes[key] = position.line, node
        return nodes

    def key(self, event: Any, path: Path) -> str:
        """Reads a key, which must be plain text."""
        position = self.position_of(event.start_mark)
        if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag is not None:
            self.fail(path, position, "a key must be plain text without anchor, alias or tag")
        if event.implicit[0] and event.value == "<<":
            self.add_problem(
                path, position, "merge keys (<<) are not supported; use extends, or repeat the keys"
            )
        if event.implicit[0] and event.value == "":
            self.add_problem(path, position, "a key is missing before ':'")
        if len(event.value) > MAX_KEY:
            self.fail(
                path, position, f"key of {len(event.value)} characters; at most {MAX_KEY} are read"
            )
        return str(event.value)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """The error message of libyaml in one line."""
    begun = f" {error.context}" if error.context else ""
    if error.context_mark:
        begun += f" that begins on line {error.context_mark.line + 1}"
    if error.problem == "found character that cannot start any token":
        begun = "; indent with spaces, not tabs, and quote text that begins with @, ` or %"
    return f"not valid YAML: {error.problem}{begun}"


def _plain(node: _Node, path: Path, positions: dict[Path, Position]) -> Any:
    """Copies a node to plain data, so that two places with the same alias share no list."""
    positions[path] = node.position
    if isinstance(node.value, dict):
        return {key: _plain(child, (*path, key), positions) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child, (*path, i), positions) for i, child in enumerate(node.value)]
    return node.value


def dump(value: Any) -> str:
    """Writes a value as YAML text, which `parse` reads back as an equal value.

    Short lists and mappings are written on one line. Raises ValueError or TypeError if the value
    cannot be written, such as a number that is not finite or a key that is not text.
    """
    lines = _block(value, 0) if _is_collection(value) and value else [dump_inline(value)]
    return "".join(f"{line}\n" for line in lines)


def _is_collection(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _block(value: Any, column: int) -> list[str]:
    """Returns the lines of a non-empty mapping or list that begins at ``column``."""
    if isinstance(value, Mapping):
        entries = [_entry(f"{_text(key)}:", item, column) for key, item in value.items()]
    else:
        entries = [_item(item, column + 2) for item in value]
    return [line for lines in entries for line in lines]


def _entry(key: str, value: Any, column: int) -> list[str]:
    if _is_short(value, column + len(key) + 1):
        return [f"{key} {dump_inline(value)}"]
    return [key, *(f"  {line}" for line in _block(value, column + 2))]


def _item(value: Any, column: int) -> list[str]:
    first, *rest = [dump_inline(value)] if _is_short(value, column) else _block(value, column)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _is_short(value: Any, column: int) -> bool:
    if not _is_collection(value) or not value:
        return True
    return _is_flat(value) and column + len(dump_inline(value)) <= MAX_COLUMNS


def _is_flat(value: Any) -> bool:
    """Whether a collection may be written on one line.

    It may hold scalars and lists of scalars. It may hold a mapping only as its single value, as in
    ``{search: {...}}``.
    """
    if not isinstance(value, Mapping):
        return not any(_is_collection(item) for item in value)
    items = list(value.values())
    if len(items) == 1 and isinstance(items[0], Mapping):
        return _is_flat(items[0])
    return not any(isinstance(item, Mapping) for item in items) and all(
        _is_flat(item) for item in items if _is_collection(item)
    )


def dump_inline(value: Any) -> str:
    """Writes a value as `dump` does, but always on one line."""
    if isinstance(value, Mapping):
        return (
            f"{{{', '.join(f'{_text(key)}: {dump_inline(item)}' for key, item in value.items())}}}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(dump_inline, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, int | float):
        return _text(value)
    # the repr of the built-in types, because the repr of a numpy float is np.float64(0.5)
    word = int.__repr__(value) if isinstance(value, int) else float.__repr__(value)
    if scalar(word) != value:
        raise ValueError(f"{word} cannot be written as a number")
    return word


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is of type {type(text).__name__} and cannot be written as YAML")
    if PLAIN.fullmatch(text) and _is_word(text):
        return text
    return f'"{ESCAPED.sub(_escape, text)}"'


def _is_word(text: str) -> bool:
    try:
        return isinstance(scalar(text), str)
    except ValueError:
        return False


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xD800 <= code < 0xE000:
        raise ValueError(f"a lone surrogate, {found[0]!a}, cannot be written")
    if found[0] in '"\\\n':
        return "\\n" if found[0] == "\n" else f"\\{found[0]}"
    return f"\\u{code:04x}"
