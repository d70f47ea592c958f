"""The classes of a VOC set, where they are not VOC's own: ``labelmap.txt``, ``name:red,green,blue:...`` a line."""

from dataclasses import dataclass
from pathlib import Path

from latentgnn.errors import UserError
from latentgnn.reading import read_lines

BACKGROUND = "background"
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True, kw_only=True)
class Labelmap:
    """Classes and their colours.

    Args:
        categories: id and name of each, from 1 on in the file's order, without the background.
        name_of_colour: the class of a colour, ``red << 16 | green << 8 | blue``; the background's is black.
    """

    categories: tuple[tuple[int, str], ...]
    name_of_colour: dict[int, str]


def read_labelmap(root: Path) -> Labelmap | None:
    """What ``labelmap.txt`` in a set's folder says, or ``None`` where there is none.

    Raises:
        UserError: it cannot be read, or a line is of another form.
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
