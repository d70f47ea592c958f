"""The classes of a VOC set with its own classes: ``labelmap.txt``, one ``name:red,green,blue:...`` per line."""

from dataclasses import dataclass
from pathlib import Path

from latentgnn.errors import UserError
from latentgnn.files.reading import read_lines

BACKGROUND = "background"


@dataclass(frozen=True, kw_only=True)
class Labelmap:
    """Classes and their colours.

    Args:
        categories: id and name of each class, numbered from 1 in the file's order, without the background.
        name_of_colour: class name by colour, ``red << 16 | green << 8 | blue``; the background is black.
    """

    categories: tuple[tuple[int, str], ...]
    name_of_colour: dict[int, str]


def read_labelmap(root: Path) -> Labelmap | None:
    """Read ``labelmap.txt`` in a set's folder; return ``None`` if there is none.

    Raises:
        UserError: if it cannot be read, or a line is malformed.
    """
    path = root / "labelmap.txt"
    if not path.is_file():
        return None
    names: dict[str, None] = {}
    colours: dict[int, str] = {}
    for number, line in enumerate(read_lines(path, "list of classes"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = line.strip().split(":")
        parts = rest[0].split(",") if rest and rest[0] else []
        numbers = [int(part) for part in parts if part.isdecimal() and int(part[:4]) < 256]
        colour = sum(value << shift for value, shift in zip(numbers, (16, 8, 0), strict=False))
        is_sound = name and len(numbers) == len(parts) and len(parts) in (0, 3)
        if not is_sound or name in names or (numbers and colour in colours):
            raise UserError(
                f"{path}: line {number}: expected name:red,green,blue with each name and colour once; got {line[:60]!r}"
            )
        names[name] = None
        if numbers:
            colours[colour] = name
    names.pop(BACKGROUND, None)
    if not names:
        raise UserError(f"{path}: it names no class")
    return Labelmap(categories=tuple(enumerate(names, 1)), name_of_colour=colours)
