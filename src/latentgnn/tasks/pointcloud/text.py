"""Scans as text: one line per point after a line of column names, as written by CloudCompare, PDAL and spreadsheets.

N is a number of points.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, told
from latentgnn.files.reading import regular_file

_LONGEST_HEADER = 2**16
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)"

# Names of columns in other programs, without characters other than letters and digits, and CloudCompare's "Scalar ".
_COLUMNS = {
    "x": "x",
    "y": "y",
    "z": "z",
    **dict.fromkeys(("r", "rf", "red"), "red"),
    **dict.fromkeys(("g", "gf", "green"), "green"),
    **dict.fromkeys(("b", "bf", "blue"), "blue"),
    **dict.fromkeys(("nx", "normalx"), "nx"),
    **dict.fromkeys(("ny", "normaly"), "ny"),
    **dict.fromkeys(("nz", "normalz"), "nz"),
    "intensity": "intensity",
    "returnnumber": "return_number",
    "numberofreturns": "number_of_returns",
    **dict.fromkeys(("label", "labels", "class", "classification"), "label"),
}


class _Header(NamedTuple):
    names: list[str]
    delimiter: str | None
    lines: int


def read_table(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the known columns of a text file by their names in PLY files, each of shape (N,).

    The first line names the columns, optionally after ``//`` or ``#``, separated by commas, semicolons, tabs or spaces
    like the other lines. It may be missing if there are only coordinates.

    Raises:
        UserError: if names are missing, coordinates are not among them, a name occurs twice, or a line does not fit
            them.
    """
    header = _header(path)
    known = [_COLUMNS.get(_plain(name), "") for name in header.names]
    found = [name for name in known if name]
    if missing := [axis for axis in "xyz" if axis not in found]:
        raise UserError(f"{path}: no column is named {', '.join(missing)}; its first line names {_list(header.names)}")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise UserError(f"{path}: several columns are {_list(twice)}; its first line names {_list(header.names)}")
    use = [place for place, name in enumerate(known) if name]
    rows = read_rows(
        path,
        width=len(known),
        what=f"{len(known)} values, {_list(header.names)}",
        use=use,
        delimiter=header.delimiter,
        skip=header.lines,
    )
    return dict(zip(found, rows.T, strict=True))


def table_bytes(columns: Mapping[str, NDArray[Any]], *, delimiter: str) -> bytes:
    """Return the content of a text file; numbers have twelve digits, which is a micrometre at map coordinates."""
    formats = ["%d" if column.dtype.kind in "iub" else "%.12g" for column in columns.values()]
    buffer = io.BytesIO()
    values = np.stack([column.astype(np.float64) for column in columns.values()], axis=1)
    np.savetxt(buffer, values, fmt=formats, delimiter=delimiter, header=delimiter.join(columns), comments="")
    return buffer.getvalue()


def read_rows(
    file: Path,
    *,
    width: int,
    what: str,
    use: Sequence[int] | None = None,
    delimiter: str | None = None,
    skip: int = 0,
) -> NDArray[np.float64]:
    """Read some or all columns of a text file as numbers; an error names the line.

    Args:
        file: the text file.
        width: number of values per line.
        what: description of the values.
        use: indices of the columns to read; ``None`` reads all.
        delimiter: separator of values; ``None`` is any white space.
        skip: number of lines before the first row.

    Returns:
        Shape (N, columns).
    """
    number = width if use is None else len(use)
    try:
        if not regular_file(file).stat().st_size:
            return np.zeros((0, number))
        with warnings.catch_warnings():
            # A file without rows is not an error here; callers that need points report it.
            warnings.simplefilter("ignore", UserWarning)
            rows = np.loadtxt(
                file,
                np.float64,
                ndmin=2,
                comments=None,
                encoding="latin-1",
                delimiter=delimiter,
                skiprows=skip,
                usecols=use,
            )
    except OSError as error:
        raise UserError(told(error, file)) from None
    except ValueError:
        rows = None
    if rows is not None and not rows.size:
        return np.zeros((0, number))
    if rows is not None and rows.shape[1] == number and _first_width(file, delimiter, skip) == width:
        return rows
    with file.open(encoding="latin-1") as lines:
        for place, line in enumerate(lines, 1):
            words = [word.strip() for word in line.strip().split(delimiter)]
            if place <= skip or words in ([], [""]):
                continue
            wanted = words if use is None else [words[column] for column in use if column < len(words)]
            if len(words) != width or not all(re.fullmatch(_NUMBER, word) for word in wanted):
                raise UserError(f"{file}: line {place}: expected {what}; got {line.strip()[:200]!r}")
    raise UserError(f"{file}: cannot be read as {what} a line")


def _first_width(file: Path, delimiter: str | None, skip: int) -> int:
    """The number of values in the first row: numpy only looks at the columns that it is asked for."""
    with file.open(encoding="latin-1") as lines:
        rows = (line.strip() for number, line in enumerate(lines) if number >= skip)
        return len(next(row for row in rows if row).split(delimiter))


def _header(path: Path) -> _Header:
    with path.open("rb") as file:
        lines = [file.readline(_LONGEST_HEADER).decode("latin-1").strip() for _ in range(2)]
    text = lines[0].removeprefix("\xef\xbb\xbf").lstrip("/#").strip()
    delimiter = next((mark for mark in (",", ";", "\t") if mark in text), None)
    names = [name.strip().strip('"') for name in text.split(delimiter)]
    if not text:
        raise UserError(f"{path}: its first line is empty: expected the names of the columns, such as 'x y z label'")
    if all(re.fullmatch(_NUMBER, name) for name in names if name):
        if len(names) == 3:
            return _Header(["x", "y", "z"], delimiter, 0)
        raise UserError(
            f"{path}: its first line is {lines[0][:100]!r}: expected the names of the columns, such as "
            "'x y z intensity label'; put such a line in front"
        )
    # CloudCompare can write the number of points in a line after the names.
    return _Header(names, delimiter, 2 if re.fullmatch(r"\d+", lines[1]) else 1)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("scalar")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:20])
