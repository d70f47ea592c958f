"""LAS and LAZ files, including COPC: read whole or in chunks, and rewritten with other classes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, require
from latentgnn.files.writing import replacing
from latentgnn.tasks.pointcloud.raw import SCALARS, RawScan, readable

CHUNK = 1_000_000
"""Number of points held in memory when a file is read or written in chunks."""

_COLOURS = ("red", "green", "blue")
# Formats 0 to 5 store classes up to 31; the formats here store the same fields and classes up to 255.
_WIDER = {0: 6, 1: 6, 2: 7, 3: 7, 4: 9, 5: 10}


def read_las(path: Path) -> RawScan:
    """Read a LAS or LAZ file."""
    with _opened(path) as reader:
        records = reader.read_points(-1)
        _check_number(path, len(records), reader)
    seen = _Seen()
    seen.add(records)
    return seen.scan(records)


class LasChunks:
    """A LAS or LAZ file read in chunks, which together equal the result of `read_las`.

    Whether a column is empty, and how many bits colours have, is known only after all points were seen. So coordinates
    are read first, and everything else in a second pass.

    Args:
        path: the file.
        size: number of points per chunk.

    Attributes:
        number: number of points according to the header.

    Raises:
        UserError: if the file is damaged or truncated.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._seen: _Seen | None = None
        with readable(path), _opened(path) as reader:
            self.number: int = reader.header.point_count

    def points(self) -> Iterator[NDArray[np.float64]]:
        """Yield the coordinates in metres, shape (n, 3) each."""
        seen = _Seen()
        for records in _chunks(self._path, self._size):
            seen.add(records)
            yield _points(records)
        self._seen = seen

    def scans(self) -> Iterator[RawScan]:
        """Yield the chunks with all their values; `points` must have been exhausted before."""
        assert self._seen is not None
        for records in _chunks(self._path, self._size):
            yield self._seen.scan(records)


def las_bytes(path: Path, scan: RawScan) -> bytes:
    """Return the content of a file ``path``, LAS or LAZ according to its suffix."""
    laspy = _laspy()
    if not np.isfinite(scan.points).all():
        raise UserError(f"{path}: LAS cannot hold coordinates that are not finite")
    header = laspy.LasHeader(point_format=7 if "color" in scan.columns else 6, version="1.4")
    if len(scan.points):
        header.offsets = np.floor(scan.points.min(axis=0))
        extent = float((scan.points.max(axis=0) - header.offsets).max())
        header.scales = np.full(3, max(1e-4, 10.0 ** np.ceil(np.log10(max(extent, 1.0) / 2**31))))
    las = laspy.LasData(header)
    las.xyz = scan.points
    for name, largest in (("intensity", 65535), ("return_number", 15), ("number_of_returns", 15)):
        if name in scan.columns:
            las[name] = np.round(scan.columns[name]).clip(0, largest).astype(np.uint16)
    if "color" in scan.columns:
        color = np.round(scan.columns["color"].clip(0, 1) * 65535).astype(np.uint16)
        las.red, las.green, las.blue = color.T
    if scan.classes is not None:
        _check_classes(path, scan.classes)
        las.classification = scan.classes.astype(np.uint8)
    buffer = io.BytesIO()
    las.write(buffer, do_compress=path.suffix.lower() == ".laz")
    return buffer.getvalue()


def rewrite_las(path: Path, classes: NDArray[np.integer[Any]], *, source: Path) -> None:
    """Rewrite a LAS or LAZ file chunk by chunk, with other classes and everything else unchanged.

    Args:
        path: file to write, LAS or LAZ according to its suffix.
        classes: id of every point, shape (N,); may be a memory map.
        source: the file that the points come from.

    Raises:
        UserError: if the number of points differs, LAS cannot store the classes, or the source is damaged.
    """
    laspy = _laspy()
    _check_classes(path, classes)
    with readable(source), _opened(source) as reader:
        header = reader.header
        if len(classes) != header.point_count:
            raise UserError(f"{source} has {header.point_count} points, but there are classes for {len(classes)}")
    wider = _WIDER.get(header.point_format.id) if classes.max(initial=0) > 31 else None
    # The points are not stored in the new file as COPC's records describe.
    for records in filter(None, (header.vlrs, header.evlrs)):
        records[:] = [record for record in records if record.user_id != "copc"]

    def converted(records: Any) -> Any:
        las = laspy.LasData(header=header, points=records)
        return las if wider is None else laspy.convert(las, point_format_id=wider)

    written = converted(laspy.ScaleAwarePointRecord.empty(header=header)).header
    first = 0
    with (
        replacing(path) as file,
        laspy.LasWriter(file, written, do_compress=path.suffix.lower() == ".laz", closefd=False) as writer,
    ):
        for chunk in _chunks(source, CHUNK):
            records = converted(chunk).points
            records["classification"] = classes[first : first + len(chunk)].astype(np.uint8)
            first += len(chunk)
            writer.write_points(records)
        if written.version.minor >= 4 and written.evlrs is not None:
            writer.write_evlrs(written.evlrs)


class _Seen:
    """What is known of a file's columns after all points were read."""

    def __init__(self) -> None:
        self._scalars: set[str] = set()
        self._brightest = 0

    def add(self, records: Any) -> None:
        present = set(records.point_format.dimension_names)
        # A value that is zero for all points was never set.
        self._scalars |= {name for name in present.intersection(SCALARS) if np.any(records[name])}
        if present.issuperset(_COLOURS):
            self._brightest = max(self._brightest, *(int(records[name].max(initial=0)) for name in _COLOURS))

    def scan(self, records: Any) -> RawScan:
        columns = {name: np.asarray(records[name]) for name in SCALARS if name in self._scalars}
        # Many writers leave the colour fields empty, and some write 8-bit values into the 16-bit fields.
        if self._brightest:
            color = np.stack([np.asarray(records[name]) for name in _COLOURS], axis=1)
            columns["color"] = color.astype(np.float32) / (255 if self._brightest < 256 else 65535)
        classes = np.asarray(records["classification"]).astype(np.int64)
        return RawScan(points=_points(records), columns=columns, classes=classes)


def _points(records: Any) -> NDArray[np.float64]:
    return np.stack([np.asarray(records[axis], np.float64) for axis in "xyz"], axis=1)


def _chunks(path: Path, size: int) -> Iterator[Any]:
    with readable(path), _opened(path) as reader:
        number = 0
        for records in reader.chunk_iterator(size):
            number += len(records)
            yield records
        _check_number(path, number, reader)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    laspy = _laspy()
    _check_claims(path)
    # The threads of the parallel backend do not survive a fork: loading processes would wait for them forever.
    with laspy.open(path, laz_backend=laspy.LazBackend.Lazrs) as reader:
        if path.stat().st_size < reader.header.offset_to_point_data:
            # A truncated header claims no points.
            raise UserError(f"{path}: it is cut short within its header")
        yield reader


def _check_number(path: Path, number: int, reader: Any) -> None:
    if number != (expected := reader.header.point_count):
        raise UserError(f"{path}: it is cut short: it announces {expected} points and has {number}")


def _check_classes(path: Path, classes: NDArray[np.integer[Any]]) -> None:
    if classes.size and not 0 <= classes.min() <= classes.max() <= 255:
        raise UserError(f"{path}: LAS holds class ids from 0 to 255; got {classes.min()} to {classes.max()}")


def _laspy() -> ModuleType:
    require("lazrs", extra="pointcloud")
    return require("laspy", extra="pointcloud")


def _check_claims(path: Path) -> None:
    """Refuse a file that claims more records or chunks than it has bytes for.

    laspy would read records for hours, and the chunk decoder would abort the process for lack of memory. The positions
    are given by the LAS specification (header) and by LASzip's (chunk table).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(375)
        if len(header) < 227:
            return
        records = [(int.from_bytes(header[100:104], "little"), 54)]
        if header[25] >= 4 and len(header) >= 247:
            records.append((int.from_bytes(header[243:247], "little"), 60))
        for number, least in records:
            if number * least > size:
                raise UserError(f"{path}: it is damaged: it claims {number:,} records in {size:,} bytes")
        if not header[104] & 0x80:
            return
        file.seek(int.from_bytes(header[96:100], "little"))
        table = int.from_bytes(file.read(8), "little", signed=True)
        if table == -1 and size >= 8:
            # Written in one pass: the position is stored at the end.
            file.seek(size - 8)
            table = int.from_bytes(file.read(8), "little", signed=True)
        if not 0 <= table <= size - 8:
            raise UserError(f"{path}: it is damaged or cut short: its table of chunks lies outside it")
        file.seek(table + 4)
        chunks = int.from_bytes(file.read(4), "little")
        if chunks > size:
            raise UserError(f"{path}: it is damaged: it claims {chunks:,} chunks in {size:,} bytes")
