"""Reads the user's text files (JSON, YAML, lines) within limits; every fault is one line with file and place.

The result is plain: lists, mappings without duplicate keys, strings that can be encoded, finite numbers of at most 64
bits, true, false and null. Nothing in a file is executed.
"""

import json
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError, reason, require
from latentgnn.files.plain_values import first_fault, json_decoder, too_deep
from latentgnn.files.yaml_loader import loader

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


# COCO's own annotations have half a gigabyte, and the largest sets about four times that. YAML is written by hand.
_MOST_JSON_BYTES = 4 * 2**30
_MOST_YAML_BYTES = 2**20
# Enough for a list of ten million images, or for the outlines of all objects in an image.
_MOST_LIST_BYTES = 2**30

LONG_NUMBER = re.compile(r"[-\d]\d{4000,}")
"""Numbers that Python refuses to parse."""
TOO_MANY_DIGITS = "a number of thousands of digits; expected at most 64 bits"


class UnreadableError(UserError):
    """A file that cannot be read, or does not have the expected content.

    Args:
        path: the file; ``None`` for a text without a file.
        place: place in the file, for example ``line 3, column 7`` or ``annotations[2].bbox``; empty for the whole file.
        message: what is wrong.
    """

    def __init__(self, path: Path | None, place: str, message: str) -> None:
        super().__init__(": ".join(part for part in (str(path or ""), place, message) if part))
        self.place = place
        self.message = message


def regular_file(path: Path | str, what: str = "file") -> Path:
    """Return the path of a regular file. Opening a pipe or a device might block forever, and reading it never end.

    Args:
        path: the path to check.
        what: name of the file in errors.

    Raises:
        UnreadableError: if there is something else, or nothing.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UnreadableError(path, "", f"there is no such {what}") from None
    except OSError as error:
        raise UnreadableError(path, "", reason(error)) from error
    except ValueError:
        # A NUL character, or a lone surrogate.
        raise UnreadableError(
            path, "", f"there is no such {what}: the name contains characters that no file name can have"
        ) from None
    if not stat.S_ISREG(mode):
        present = next((name for fits, name in _KINDS if fits(mode)), "something else")
        raise UnreadableError(path, "", f"expected a file; this is {present}")
    return path


def read_json(path: Path | str, what: str = "file", *, finite: bool = True, most_bytes: int = _MOST_JSON_BYTES) -> Any:
    """Return the content of a JSON file in UTF-8.

    Args:
        path: the file.
        what: name of the file in errors.
        finite: refuse infinite numbers and NaN, which files written by Python may contain.
        most_bytes: maximum size of a file that is read.

    Raises:
        UnreadableError: if it cannot be read, is too large, is not JSON, or contains a duplicate key, a number that is
            not finite or has more than 64 bits, a lone surrogate, or lists and mappings nested deeper than
            `MOST_DEPTH`. Its cause is the operating system's error, if there is one.
    """
    path = Path(path)
    return parse_json(_text(path, what, most_bytes, "malformed JSON: "), path, finite=finite)


def parse_json(text: str, path: Path, *, finite: bool = True) -> Any:
    """Return the content of JSON inside another file.

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
        # Python's own limit on digits; its message does not give the position.
        number = LONG_NUMBER.search(text)
        place = _line_and_column(text, number.start()) if number else ""
        raise UnreadableError(path, place, TOO_MANY_DIGITS) from None
    check_values(value, path, finite=finite)
    return value


def read_lines(path: Path | str, what: str = "file", *, most_bytes: int = _MOST_LIST_BYTES) -> list[str]:
    """Return the lines of a text file in UTF-8, without line ends.

    Args:
        path: the file.
        what: name of the file in errors.
        most_bytes: maximum size of a file that is read.

    Raises:
        UnreadableError: if it cannot be read, is too large, or is not text.
    """
    return _text(Path(path), what, most_bytes, "").splitlines()


def read_yaml(path: Path | str, what: str = "configuration file") -> dict[str, Any]:
    """Return the mapping in a YAML file in UTF-8; an empty file gives an empty mapping.

    Args:
        path: a file of at most a mebibyte.
        what: name of the file in errors.

    Raises:
        UnreadableError: if it cannot be read, is not YAML (with line and column), is not a mapping, or `parse_yaml`
            refuses it.
    """
    path = Path(path)
    value = _yaml(_text(path, what, _MOST_YAML_BYTES, ""), path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UnreadableError(path, "", f"expected a mapping of settings, got {type(value).__name__}")
    return value


def parse_yaml(text: str) -> Any:
    """Parse a YAML value: mappings, lists, strings, numbers, true, false and null.

    Dates are strings, and ``1e-4`` is a number. Aliases count as what they stand for, at most 100,000 values.

    Raises:
        UnreadableError: for another tag, a duplicate key, an alias within its own value, or what `read_json` refuses.
    """
    return _yaml(text, None)


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


def check_values(value: Any, path: Path | None, *, within: Sequence[str | int] = (), finite: bool = True) -> None:
    """Refuse values that a parser accepts but we do not, see `latentgnn.files.plain_values.first_fault`.

    Raises:
        UnreadableError: for the first such value, with its place.
    """
    if (fault := first_fault(value, within, finite=finite)) is not None:
        raise UnreadableError(path, *fault)


def _yaml(text: str, path: Path | None) -> Any:
    yaml = require("yaml", extra="train")
    try:
        value = yaml.load(text, Loader=loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UnreadableError(path, place, ", ".join(filter(None, (error.context, error.problem)))) from None
    except yaml.reader.ReaderError as error:
        place = _line_and_column(text, error.position)
        raise UnreadableError(path, place, f"the character #x{error.character:04x} does not belong in YAML") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Escapes beyond Unicode, and version numbers with thousands of digits.
        raise UnreadableError(path, "", f"malformed YAML: {error}") from None
    check_values(value, path)
    return value
