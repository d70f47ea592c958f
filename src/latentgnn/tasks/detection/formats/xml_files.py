"""XML files read within limits into a tree with line numbers; document types are refused, so no entity can expand."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from latentgnn.errors import reason
from latentgnn.files.plain_values import MOST_DEPTH
from latentgnn.files.reading import UnreadableError, regular_file

# An object takes about 300 bytes.
_MOST_BYTES = 64 * 2**20


@dataclass(slots=True)
class Element:
    """An element of an XML file.

    Args:
        name: its tag.
        line: the line where it begins, from 1.
        text: text directly inside it, without surrounding white space.
        children: elements directly inside it.
    """

    name: str
    line: int
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def all(self, name: str) -> Iterator["Element"]:
        """Yield the children with a name."""
        return (child for child in self.children if child.name == name)

    def first(self, name: str) -> "Element | None":
        """Return the first child with a name."""
        return next(self.all(name), None)

    def text_of(self, *names: str) -> str | None:
        """Return the text of a child, of a child's child, and so on; ``None`` if there is none."""
        element: Element | None = self
        for name in names:
            element = element.first(name) if element is not None else None
        return element.text if element is not None else None


def read_xml(path: Path, what: str = "annotation file") -> Element:
    """Return the root element of an XML file.

    Args:
        path: a file of at most 64 MiB.
        what: name of the file in errors.

    Raises:
        UnreadableError: if it cannot be read, is not XML, has a document type, or is nested deeper than `MOST_DEPTH`.
    """
    regular_file(path, what)
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise UnreadableError(path, "", f"the {what} has {size:,} bytes; expected at most {_MOST_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(path, "", reason(error)) from error
    return _Tree(path).parse(content)


class _Tree:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: list[Element] = [Element("", 0)]
        self.texts: list[list[str]] = [[]]
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self.refuse_doctype
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.add

    def parse(self, content: bytes) -> Element:
        try:
            self.parser.Parse(content, True)
        except expat.ExpatError as error:
            message = f"malformed XML: {expat.ErrorString(error.code)}"
            raise UnreadableError(self.path, f"line {error.lineno}, column {error.offset + 1}", message) from None
        except (LookupError, ValueError) as error:
            # An unknown encoding, or one that expat does not support.
            raise UnreadableError(self.path, "line 1", f"malformed XML: {error}") from None
        return self.open[0].children[0]

    def refuse_doctype(self, *_: object) -> None:
        raise self.fault("it has a document type (<!DOCTYPE), which annotations need not have: take it out")

    def start(self, name: str, _: object) -> None:
        if len(self.open) > MOST_DEPTH:
            raise self.fault(f"nested too deeply; expected at most {MOST_DEPTH} elements within one another")
        self.open.append(Element(name, self.parser.CurrentLineNumber))
        self.texts.append([])

    def end(self, _: str) -> None:
        element = self.open.pop()
        element.text = "".join(self.texts.pop()).strip()
        self.open[-1].children.append(element)

    def add(self, text: str) -> None:
        self.texts[-1].append(text)

    def fault(self, message: str) -> UnreadableError:
        return UnreadableError(self.path, f"line {self.parser.CurrentLineNumber}", message)
