"""JSON files with lists that are too long to keep in memory; they are scanned once, chunk by chunk."""

import codecs
import itertools
import json
import os
import re
from array import array
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latentgnn.errors import reason
from latentgnn.files.plain_values import json_decoder, too_deep
from latentgnn.files.reading import LONG_NUMBER, TOO_MANY_DIGITS, UnreadableError, check_values, regular_file
from latentgnn.files.stored_lists import Source, StoredFile, StoredList, version_of

MOST_BYTES = 2**38
"""Maximum size of a file: a hundred million images."""
MOST_ELEMENT_CHARACTERS = 2**27
"""Maximum length of an element of such a list; lengths are stored in 32 bits."""
MOST_CHARACTERS = 2**32
"""Maximum length of any other value at the top level, which is kept in memory."""

_CHUNK = 2**22
_SPACE = re.compile(r"[ \t\n\r]*")
# If a text is truncated, the parser reports its end, or inside an escape a position at most this far before it.
_ESCAPE = 12
_EXPONENT = 3


def read_json_lists(
    path: Path | str, names: Collection[str], what: str = "file", *, most_bytes: int = MOST_BYTES
) -> Any:
    """Read a UTF-8 JSON file, with some lists of its top-level object as `latentgnn.files.stored_lists.StoredList`.

    The whole file is checked once, as strictly as by `latentgnn.files.reading.read_json`, with only one chunk in memory
    at a time.

    Args:
        path: the file.
        names: names of lists in the top-level object; values that are not lists are returned unchanged.
        what: name of the file in errors.
        most_bytes: maximum size of a file that is read.

    Raises:
        UnreadableError: as in `latentgnn.files.reading.read_json`; also if an element is longer than
            `MOST_ELEMENT_CHARACTERS`.
    """
    path = regular_file(path, what)
    try:
        with path.open("rb") as file:
            version = version_of(os.fstat(file.fileno()))
            if version[0] > most_bytes:
                raise UnreadableError(path, "", f"the {what} has {version[0]:,} bytes; expected at most {most_bytes:,}")
            return _Scanner(path, iter(lambda: file.read(_CHUNK), b"")).top(frozenset(names), StoredFile(path, version))
    except OSError as error:
        raise UnreadableError(path, "", reason(error)) from error


class _Scanner:
    """One pass over JSON text in chunks.

    Args:
        path: path of the file, for errors.
        chunks: chunks of its bytes.
    """

    def __init__(self, path: Path, chunks: Iterable[bytes]) -> None:
        self._path = path
        self._texts = _decoded(path, chunks)
        self._decoder = json_decoder()
        self._most = MOST_CHARACTERS
        self._text, self._at = "", 0
        # Size of the text dropped from the front: bytes, lines, and characters of the last line.
        self._bytes = self._lines = self._columns = 0
        self._marked = 0  # the position in the text up to which bytes have been counted
        # Some programs write a byte order mark.
        if self._more() and self._text[0] == "\ufeff":
            self._text, self._bytes = self._text[1:], 3

    def top(self, names: frozenset[str], source: Source) -> Any:
        """Parse the whole file."""
        if self._next() != "{":
            value = self._value()
            check_values(value, self._path)
        else:
            value = {}
            for key in self._members():
                if key in value:
                    raise UnreadableError(self._path, "", f"the key {json.dumps(key)} is given twice")
                if key in names and self._next() == "[":
                    value[key] = self._list(key, source)
                else:
                    value[key] = self._value()
                    check_values(value[key], self._path, within=(key,))
        if self._next():
            raise self._malformed("Extra data")
        return value

    def _members(self) -> Iterator[str]:
        """Yield the keys of an object, each when its value is next."""
        self._at += 1
        character = self._next()
        while character != "}":
            if character != '"':
                raise self._malformed("Expecting property name enclosed in double quotes")
            key = self._value()
            if self._next() != ":":
                raise self._malformed("Expecting ':' delimiter")
            self._at += 1
            self._next()
            yield key
            character = self._separator("}")
        self._at += 1

    def _list(self, name: str, source: Source) -> StoredList:
        starts, lengths = array("q"), array("i")
        self._at += 1
        character = self._next()
        self._most = MOST_ELEMENT_CHARACTERS
        while character != "]":
            start = self._place()
            value = self._value()
            starts.append(start)
            lengths.append(self._place() - start)
            check_values(value, self._path, within=(name, len(starts) - 1))
            character = self._separator("]")
        self._most = MOST_CHARACTERS
        self._at += 1
        return StoredList(source, np.array(starts, np.int64), np.array(lengths, np.int32))

    def _separator(self, end: str) -> str:
        """Return the first character of the next element, or the end."""
        character = self._next()
        if character == ",":
            self._at += 1
            character = self._next()
            if character in ("", end):
                raise self._malformed("Expecting value" if end == "]" else "Expecting property name in double quotes")
        elif character != end:
            raise self._malformed("Expecting ',' delimiter")
        return character

    def _next(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        """Parse the value that begins at the next character."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _ESCAPE
                if is_cut and self._more():
                    continue
                raise self._malformed(error.msg, error.pos) from None
            except RecursionError:
                raise UnreadableError(self._path, "", too_deep()) from None
            except ValueError:
                # Python's own limit on digits; its message does not give the position.
                number = LONG_NUMBER.search(self._text, self._at)
                place = self._line_and_column(number.start()) if number else ""
                raise UnreadableError(self._path, place, TOO_MANY_DIGITS) from None
            # A number at the end of the text may continue: of 1e+5, the parser takes 1 while the 5 is missing.
            if end > len(self._text) - _EXPONENT and self._more():
                continue
            self._at = end
            return value

    def _more(self) -> bool:
        """Read the next chunk and drop the text that is done; return whether there was one."""
        text = next(filter(None, self._texts), "")
        if not text:
            return False
        rest = len(self._text) - self._at
        if rest > self._most:
            message = f"a value of more than {self._most:,} characters"
            raise UnreadableError(self._path, self._line_and_column(self._at), message)
        # Read as much again as is held; otherwise a long value would be parsed again for each chunk.
        texts = [text]
        while sum(map(len, texts)) < rest and (text := next(filter(None, self._texts), "")):
            texts.append(text)
        self._place()
        lines = self._text.count("\n", 0, self._at)
        self._lines += lines
        self._columns = self._at - self._text.rfind("\n", 0, self._at) - 1 + (0 if lines else self._columns)
        self._text, self._at, self._marked = "".join([self._text[self._at :], *texts]), 0, 0
        return True

    def _place(self) -> int:
        """The file offset in bytes of the text's next character."""
        done = self._text[self._marked : self._at]
        self._bytes += len(done) if done.isascii() else len(done.encode("utf-8", "surrogatepass"))
        self._marked = self._at
        return self._bytes

    def _malformed(self, message: str, position: int | None = None) -> UnreadableError:
        place = self._line_and_column(self._at if position is None else position)
        return UnreadableError(self._path, place, f"malformed JSON: {message if self._text else 'Expecting value'}")

    def _line_and_column(self, position: int) -> str:
        lines = self._text.count("\n", 0, position)
        column = position - self._text.rfind("\n", 0, position) + (0 if lines else self._columns)
        return f"line {self._lines + lines + 1}, column {column}"


def _decoded(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode UTF-8 in chunks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    for chunk in itertools.chain(chunks, [b""]):
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # The error's bytes begin with those that the decoder kept from the previous chunk.
            place = _line_and_column(path, done - (len(error.object) - len(chunk)) + error.start)
            raise UnreadableError(path, place, f"malformed JSON: not UTF-8 text ({error.reason})") from None
        done += len(chunk)


def _line_and_column(path: Path, position: int) -> str:
    """Line and column of a byte, with columns counted in bytes."""
    line, column = 1, 1
    with path.open("rb") as file:
        while position > 0 and (chunk := file.read(min(position, _CHUNK))):
            position -= len(chunk)
            line += chunk.count(b"\n")
            column = len(chunk) - chunk.rfind(b"\n") + (0 if b"\n" in chunk else column - 1)
    return f"line {line}, column {column}"
