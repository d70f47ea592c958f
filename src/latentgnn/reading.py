"""Text that a user hands in (JSON, YAML, lines), read within limits; every fault is one line with file and place.

What comes out is plain: lists, mappings whose keys are given once, texts that can be written again, finite numbers of
at most 64 bits, true, false and null. Nothing that a file says is run.
"""

import json
import re
import stat
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from latentgnn.errors import UserError, reason, require

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

MOST_DEPTH = 64
"""Lists and mappings within one another."""

# COCO's own annotations have half a gigabyte, and the largest sets some four times that. YAML is written by hand.
_MOST_JSON_BYTES = 4 * 2**30
_MOST_YAML_BYTES = 2**20
# A list of ten million images, or the outlines of all objects on an image.
_MOST_LIST_BYTES = 2**30
_MOST_YAML_VALUES = 100_000
_MOST_YAML_DIGITS = 100

LONG_NUMBER = re.compile(r"[-\d]\d{4000,}")
"""What Python refuses to parse."""
TOO_MANY_DIGITS = "a number of thousands of digits; expected at most 64 bits"

_INT_END = 2**63
_SURROGATE = re.compile("[\ud800-\udfff]")

_YAML = "tag:yaml.org,2002:"
# YAML 1.1, which PyYAML reads, takes 1e-4 for a text.
SCIENTIFIC = (f"{_YAML}float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class UnreadableError(UserError):
    """A file that cannot be read, or does not hold what it should.

    Args:
        path: the file; ``None`` for a text that came by itself.
        place: where in it, for example ``line 3, column 7`` or ``annotations[2].bbox``; empty for all of it.
        message: what is wrong.
    """

    def __init__(self, path: Path | None, place: str, message: str) -> None:
        super().__init__(": ".join(part for part in (str(path or ""), place, message) if part))
        self.place = place
        self.message = message


def regular_file(path: Path | str, what: str = "file") -> Path:
    """The path of an ordinary file. Opening a pipe or a device may wait for ever, and reading it may never end.

    Args:
        path: where it should be.
        what: what it is called in errors.

    Raises:
        UnreadableError: something else is there, or nothing.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UnreadableError(path, "", f"there is no such {what}") from None
    except OSError as error:
        raise UnreadableError(path, "", reason(error)) from error
    except ValueError:
        # A NUL, or half of a surrogate pair.
        raise UnreadableError(path, "", f"there is no such {what}: no file's name has such characters") from None
    if not stat.S_ISREG(mode):
        present = next((name for fits, name in _KINDS if fits(mode)), "something else")
        raise UnreadableError(path, "", f"expected a file; this is {present}")
    return path


def read_json(path: Path | str, what: str = "file", *, finite: bool = True, most_bytes: int = _MOST_JSON_BYTES) -> Any:
    """What a JSON file in UTF-8 holds.

    Args:
        path: the file.
        what: what it is called in errors.
        finite: refuse numbers that are infinite or not numbers, which Python's own files may hold.
        most_bytes: the size of the largest file that is read.

    Raises:
        UnreadableError: it cannot be read, is too large, is not JSON, or holds a key twice, a number that is not finite
            or has more than 64 bits, half of a surrogate pair, or lists and mappings deeper than `MOST_DEPTH`. Its
            cause is the operating system's error, where there is one.
    """
    path = Path(path)
    return parse_json(_text(path, what, most_bytes, "malformed JSON: "), path, finite=finite)


def parse_json(text: str, path: Path, *, finite: bool = True) -> Any:
    """What JSON inside another file holds.

    Args:
        text: the JSON.
        path: the file, for errors.
        finite: see `read_json`.

    Raises:
        UnreadableError: see `read_json`.
    """
    try:
        value = json_decoder().decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UnreadableError(path, place, f"malformed JSON: {error.msg}") from None
    except RecursionError:
        raise UnreadableError(path, "", too_deep()) from None
    except ValueError:
        # Python's own limit of digits; its message does not say where.
        number = LONG_NUMBER.search(text)
        place = _line_and_column(text, number.start()) if number else ""
        raise UnreadableError(path, place, TOO_MANY_DIGITS) from None
    check_values(value, path, finite=finite)
    return value


def json_decoder() -> json.JSONDecoder:
    """A parser whose values are to be given to `check_values`, which then finds keys that were given twice."""
    return json.JSONDecoder(object_pairs_hook=_mapping)


def read_lines(path: Path | str, what: str = "file", *, most_bytes: int = _MOST_LIST_BYTES) -> list[str]:
    """The lines of a text file in UTF-8, without their ends.

    Args:
        path: the file.
        what: what it is called in errors.
        most_bytes: the size of the largest file that is read.

    Raises:
        UnreadableError: it cannot be read, is too large, or is no text.
    """
    return _text(Path(path), what, most_bytes, "").splitlines()


def read_yaml(path: Path | str, what: str = "configuration file") -> dict[str, Any]:
    """The mapping that a YAML file in UTF-8 holds; an empty file holds an empty one.

    Args:
        path: of at most a mebibyte.
        what: what it is called in errors.

    Raises:
        UnreadableError: it cannot be read, is not YAML (with line and column), is not a mapping, or is none of what
            `parse_yaml` takes.
    """
    path = Path(path)
    value = _yaml(_text(path, what, _MOST_YAML_BYTES, ""), path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UnreadableError(path, "", f"expected a mapping of settings, got {type(value).__name__}")
    return value


def parse_yaml(text: str) -> Any:
    """A value in YAML: mappings, lists, texts, numbers, true, false and null.

    Dates are texts, ``1e-4`` is a number. Aliases count as what they stand for, and stand for 100,000 values at most.

    Raises:
        UnreadableError: another tag, a key given twice, an alias within its own value, or what `read_json` refuses.
    """
    return _yaml(text, None)


def shown(value: Any) -> str:
    """A value as JSON in an error: short, and in ASCII.

    Example:
        >>> shown({"size": [3, None]})
        '{"size": [3, null]}'
    """
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(path: Path, what: str, most_bytes: int, kind: str) -> str:
    regular_file(path, what)
    try:
        if (size := path.stat().st_size) > most_bytes:
            raise UnreadableError(path, "", f"the {what} has {size:,} bytes; expected at most {most_bytes:,}")
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(path, "", reason(error)) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        place = f"line {line}, column {column}"
        raise UnreadableError(path, place, f"{kind}not UTF-8 text ({error.reason})") from None


def _line_and_column(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


def too_deep() -> str:
    """What to say of lists and mappings deeper than `MOST_DEPTH`."""
    return f"nested too deeply; expected at most {MOST_DEPTH} lists and mappings within one another"


class _GivenTwice(dict[str, Any]):
    """A mapping with a key that was given more than once, to be told when its place is known."""


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else _GivenTwice(_repeated(pairs))


def _repeated(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    return {key: value for key, value in pairs if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


_Trail = tuple[Any, Any] | None


def check_values(value: Any, path: Path | None, *, within: Sequence[str | int] = (), finite: bool = True) -> None:
    """Refuse what a parser lets through: see `read_json`.

    Args:
        value: from `json_decoder`, or plain.
        path: of its file.
        within: the keys that lead to it there, outermost first.
        finite: refuse numbers that are infinite or not numbers.

    Raises:
        UnreadableError: with the place of the first such value.
    """
    trail: _Trail = None
    for key in within[:-1]:
        trail = trail, key
    # A mapping of one value: its key is part of the place, and 0 stands for all of a file.
    fault = _first_fault({within[-1] if within else 0: value}, len(within), trail, finite)
    if fault is None:
        return
    trail, message = fault
    keys: list[Any] = []
    while trail is not None:
        trail, key = trail
        keys.insert(0, key)
    steps = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in (keys if within else keys[1:])]
    place = "".join(steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-2:]])
    raise UnreadableError(path, place.removeprefix(".").encode("ascii", "backslashreplace").decode(), message)


def _first_fault(container: Any, depth: int, trail: _Trail, finite: bool) -> tuple[_Trail, str] | None:
    """The keys that lead to the first fault within a list or mapping, innermost first, and what it is."""
    is_mapping = isinstance(container, dict)
    for key, value in container.items() if is_mapping else enumerate(container):
        if is_mapping and isinstance(key, str) and _is_torn(key):
            return trail, f"the key {shown(key)} has half of a surrogate pair; no text has"
        kind = type(value)
        if kind is float:
            # Neither infinity nor NaN minus itself is zero.
            if finite and value - value != 0.0:
                return (trail, key), f"{value} is not a finite number"
        elif kind is int:
            if not -_INT_END <= value < _INT_END:
                return (trail, key), "expected a number of at most 64 bits"
        elif kind is str:
            if _is_torn(value):
                return (trail, key), f"{shown(value)} has half of a surrogate pair; no text has"
        elif kind is dict or kind is list:
            if depth == MOST_DEPTH:
                return (trail, key), too_deep()
            if (fault := _first_fault(value, depth + 1, (trail, key), finite)) is not None:
                return fault
        elif kind is _GivenTwice:
            return (trail, key), f"the key {shown(next(iter(value)))} is given twice"
    return None


def _is_torn(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None


def _yaml(text: str, path: Path | None) -> Any:
    yaml = require("yaml", extra="train")
    try:
        value = yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UnreadableError(path, place, ", ".join(filter(None, (error.context, error.problem)))) from None
    except yaml.reader.ReaderError as error:
        place = _line_and_column(text, error.position)
        raise UnreadableError(path, place, f"the character #x{error.character:04x} does not belong in YAML") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Escapes beyond Unicode, and versions of thousands of digits.
        raise UnreadableError(path, "", f"malformed YAML: {error}") from None
    check_values(value, path)
    return value


@cache
def _loader() -> Any:
    """PyYAML's safe loader within limits, without its tags for dates, sets and binary data."""
    yaml = require("yaml", extra="train")
    safe, refuse = yaml.SafeLoader, yaml.constructor.ConstructorError
    kinds = {"int": "no whole number", "float": "no number", "bool": "neither true nor false"}
    tags = {f"{_YAML}{name}" for name in (*kinds, "null", "str", "seq", "map")}
    merge = f"{_YAML}merge"

    class Loader(safe):  # type: ignore[misc, valid-type]
        yaml_constructors: ClassVar = {tag: safe.yaml_constructors[tag] for tag in tags}
        yaml_implicit_resolvers: ClassVar = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag in tags or tag == merge]
            for first, resolvers in safe.yaml_implicit_resolvers.items()
        }

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.depth = 0
            # Of every finished node: values in it, with aliases written out, and how deep they lie.
            self.extents: dict[int, tuple[int, int]] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > MOST_DEPTH + 1:
                raise refuse(None, None, too_deep(), mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            if id(node) not in self.extents:
                if is_alias:
                    raise refuse(None, None, "an alias stands within what it stands for", mark)
                self.extents[id(node)] = self.extent(node)
            values, depth = self.extents[id(node)]
            if values > _MOST_YAML_VALUES:
                raise refuse(None, None, f"more than {_MOST_YAML_VALUES:,} values, with aliases written out", mark)
            if depth > MOST_DEPTH + 1:
                raise refuse(None, None, too_deep(), mark)
            return node

        def extent(self, node: Any) -> tuple[int, int]:
            children: list[Any] = []
            if isinstance(node, yaml.SequenceNode):
                children = node.value
            elif isinstance(node, yaml.MappingNode):
                children = [child for pair in node.value for child in pair]
            extents = [self.extents[id(child)] for child in children]
            values, depths = zip(*extents, strict=True) if extents else ((0,), (0,))
            return 1 + sum(values), 1 + max(depths)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys: set[Any] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise refuse(None, None, "expected a text or a number as key", key.start_mark)
                value = self.construct_object(key) if key.tag != merge else key.value
                if value in keys:
                    raise refuse(None, None, f"{key.value!r} is given twice", key.start_mark)
                keys.add(value)
            return node

    def strictly(construct: Any, kind: str) -> Any:
        def constructor(loader: Any, node: Any) -> Any:
            if len(node.value) > _MOST_YAML_DIGITS:
                raise refuse(None, None, f"a number of {len(node.value)} characters", node.start_mark)
            try:
                return construct(loader, node)
            except (ValueError, KeyError, IndexError):
                raise refuse(None, None, f"{node.value!r} is {kind}", node.start_mark) from None

        return constructor

    def strange(loader: Any, node: Any) -> Any:
        raise refuse(None, None, f"the tag {node.tag!r} is not taken; expected plain values", node.start_mark)

    Loader.add_constructor(None, strange)
    for name, kind in kinds.items():
        Loader.add_constructor(f"{_YAML}{name}", strictly(safe.yaml_constructors[f"{_YAML}{name}"], kind))
    Loader.add_implicit_resolver(*SCIENTIFIC)
    return Loader
