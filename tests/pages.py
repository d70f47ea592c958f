"""The pages of the README and of docs/, as blocks of code, quotes and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block without a language is commands, or what one prints.
SHELL = ("", "bash", "sh", "console")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        language: what stands after its fence, such as ``python`` or ``python raises``.
        code: its lines.
        quote: the quote that stands last before it, on one line.
        line: of its fence, from 1 on.
    """

    language: str
    code: str
    quote: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    quote, end = "", 0
    for fence in re.finditer(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", text, re.DOTALL | re.MULTILINE):
        quotes = re.findall(r"(?:^> .*\n)+", text[end : fence.start()], re.MULTILINE)
        if quotes:
            quote = " ".join(line.removeprefix("> ") for line in quotes[-1].splitlines())
        line, end = text.count("\n", 0, fence.start()) + 1, fence.end()
        yield Block(fence[3].strip(), fence[4], quote, line)


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """The arguments of every call of a program in a page's blocks, without what the shell takes for itself."""
    for block in blocks(page):
        if block.language not in SHELL:
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            for part in re.split(r" && | \| ", line.removeprefix("$ ")):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # a line of output, with a quote in it
                    continue
                if words and Path(words[0]).name == program:
                    yield words[1 : next((i for i, word in enumerate(words) if word in (">", ">>", "<")), None)]
