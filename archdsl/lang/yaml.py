"""YAML 1.2 text -> tree with positions, and back.

Scalars follow the core schema (yaml.org/spec/1.2.2, 10.3): ``1e-3`` is a number, ``on`` is a
word, ``010`` is ten. Tags, merge keys, duplicate keys and numbers that are not finite are errors.
libyaml is used as a stream of events only, so that a hostile file is refused before anything grows.
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

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is some 20 times faster

# all but YAML's own printable characters, with the line breaks that no editor counts and BOMs; so,
# and not as what is left of the printable ones, they compile in a tenth of the time
NOT_PRINTABLE = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff"
REFUSED = re.compile(f"[{NOT_PRINTABLE}]")
ESCAPED = re.compile(rf'["\\\t\n\r{NOT_PRINTABLE}]')
NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
PLAIN = re.compile(r"\w[\w./+%-]*( [\w./+%-]+)*")  # the words that need no quotes anywhere


@dataclass(frozen=True)
class Tree:
    """Plain dicts, lists and scalars, and the place in the text of the value at each path."""

    value: Any
    positions: dict[Path, Position]

    def position(self, path: Path) -> Position | None:
        """The place of the value at ``path``, or of the nearest value around it."""
        while path and path not in self.positions:
            path = path[:-1]
        return self.positions.get(path)


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def parse(text: str, file: str = "<string>") -> Tree:
    """The one document in ``text``; raises SpecError with everything that is wrong in it."""
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
        composer.fail((), composer.place(error.problem_mark), _syntax(error))
    if composer.problems:
        raise SpecError(composer.problems)
    positions: dict[Path, Position] = {}
    return Tree(_plain(node, (), positions), positions)


def scalar(text: str) -> Any:
    """What an unquoted word means; ValueError for numbers that cannot be."""
    if NULL.fullmatch(text):
        return None
    if found := BOOL.fullmatch(text):
        return found[1] is not None
    if NOT_FINITE.fullmatch(text):
        raise ValueError(f"number {text} is not finite; quote it if a word is meant")
    integer = INT.fullmatch(text)
    if not integer and not FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError(f"number of {len(text)} characters; at most {MAX_DIGITS} are read")
    if integer:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if abs(number := float(text)) == float("inf"):
        raise ValueError(f"number {text} is too large")
    return number


@dataclass(frozen=True)
class _Node:
    value: Any  # a scalar, list[_Node] or dict[str, _Node]
    position: Position
    size: int = 1
    height: int = 0


class _Composer:
    """Events -> nodes, counting as it goes what the nodes would be with every alias expanded."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.events: Iterator[Any] = yaml.parse(text, Loader=LOADER)
        self.anchors: dict[str, _Node | None] = {}  # None while the anchored value is still open
        self.problems: list[Problem] = []
        self.nodes = 0

    def place(self, position: Any) -> Position:
        return Position(self.file, position.line + 1, position.column + 1)

    def say(self, path: Path, position: Position, message: str) -> None:
        if len(self.problems) == MAX_PROBLEMS:
            self.fail(path, position, f"more than {MAX_PROBLEMS} problems; reading stopped here")
        self.problems.append(Problem(dotted(path), message, position))

    def fail(self, path: Path, position: Position, message: str) -> NoReturn:
        raise SpecError([*self.problems, Problem(dotted(path), message, position)])

    def document(self) -> _Node:
        next(self.events)  # start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            self.fail((), Position(self.file, 0, 0), "is empty")
        node = self.node(next(self.events), ())
        next(self.events)  # end of the document
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            self.fail((), self.place(event.start_mark), "second document; a file holds one")
        return node

    def node(self, event: Any, path: Path) -> _Node:
        position = self.place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), path, position)
        self.grow(1, 0, path, position)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.say(
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

    def grow(self, size: int, height: int, path: Path, position: Position) -> None:
        self.nodes += size
        if self.nodes > MAX_NODES:
            self.fail((), position, f"more than {MAX_NODES} values, aliases expanded")
        if len(path) + height > MAX_DEPTH:
            self.fail((), position, f"nested more than {MAX_DEPTH} levels deep")

    def alias(self, name: str, path: Path, position: Position) -> _Node:
        node = self.anchors.get(name)
        if node is None:
            known = "stands inside the value it names" if name in self.anchors else "is not defined"
            self.fail(path, position, f"alias *{name[:50]} {known}")
        self.grow(node.size, node.height, path, position)
        return _Node(node.value, position, node.size, node.height)

    def content(self, event: Any, path: Path, position: Position) -> _Node:
        if isinstance(event, yaml.ScalarEvent):
            return _Node(self.scalar(event, path, position), position)
        listing = isinstance(event, yaml.SequenceStartEvent)
        value = self.sequence(path) if listing else self.mapping(path)
        nodes = value if isinstance(value, list) else list(value.values())
        height = 1 + max((node.height for node in nodes), default=-1)
        return _Node(value, position, 1 + sum(node.size for node in nodes), height)

    def scalar(self, event: Any, path: Path, position: Position) -> Any:
        if not event.implicit[0]:
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self.say(path, position, str(error))
            return None

    def sequence(self, path: Path) -> list[_Node]:
        nodes: list[_Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            nodes.append(self.node(event, (*path, len(nodes))))
        return nodes

    def mapping(self, path: Path) -> dict[str, _Node]:
        nodes: dict[str, _Node] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key, position = self.key(event, path), self.place(event.start_mark)
            node = self.node(next(self.events), (*path, key))
            if first := lines.get(key):
                self.say((*path, key), position, f"key {key!r} was already given on line {first}")
            lines[key], nodes[key] = position.line, node
        return nodes

    def key(self, event: Any, path: Path) -> str:
        position = self.place(event.start_mark)
        if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag is not None:
            self.fail(path, position, "a key must be a plain word, without anchor, alias or tag")
        if event.implicit[0] and event.value == "<<":
            self.say(
                path, position, "merge keys (<<) are not supported; use extends, or repeat the keys"
            )
        if event.implicit[0] and event.value == "":
            self.say(path, position, "a key is missing before ':'")
        if len(event.value) > MAX_KEY:
            self.fail(
                path, position, f"key of {len(event.value)} characters; at most {MAX_KEY} are read"
            )
        return str(event.value)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """libyaml's complaint in one line."""
    begun = f" {error.context}" if error.context else ""
    if error.context_mark:
        begun += f" that begins on line {error.context_mark.line + 1}"
    if error.problem == "found character that cannot start any token":
        begun = "; indent with spaces, not tabs, and quote text that begins with @, ` or %"
    return f"not valid YAML: {error.problem}{begun}"


def _plain(node: _Node, path: Path, positions: dict[Path, Position]) -> Any:
    """The node as fresh plain data, so that no two places share a list."""
    positions[path] = node.position
    if isinstance(node.value, dict):
        return {key: _plain(child, (*path, key), positions) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child, (*path, i), positions) for i, child in enumerate(node.value)]
    return node.value


def dump(value: Any) -> str:
    """YAML that ``parse`` reads back as an equal value; what is short stands on one line."""
    lines = _block(value, 0) if _is_collection(value) and value else [dump_inline(value)]
    return "".join(f"{line}\n" for line in lines)


def _is_collection(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _block(value: Any, column: int) -> list[str]:
    """Lines of a non-empty mapping or list whose first character stands at ``column``."""
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
    """Scalars and lists of scalars; a mapping only as the one value of another, as in leaves."""
    if not isinstance(value, Mapping):
        return not any(_is_collection(item) for item in value)
    items = list(value.values())
    if len(items) == 1 and isinstance(items[0], Mapping):
        return _is_flat(items[0])
    return not any(isinstance(item, Mapping) for item in items) and all(
        _is_flat(item) for item in items if _is_collection(item)
    )


def dump_inline(value: Any) -> str:
    """The same on one line, however long."""
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
    # the plain types' own repr, because numpy's float says np.float64(0.5)
    word = int.__repr__(value) if isinstance(value, int) else float.__repr__(value)
    if scalar(word) != value:
        raise ValueError(f"{word} cannot be written as a number")
    return word


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is {type(text).__name__}; YAML here holds text, numbers, lists")
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
        raise ValueError(f"half a character, {found[0]!a}, cannot be written")
    if found[0] in '"\\\n':
        return "\\n" if found[0] == "\n" else f"\\{found[0]}"
    return f"\\u{code:04x}"
